"""Paged attention on CPU: torch's flash attention over views of the pool.

A step is planned once and run for every layer. Where a row's blocks lie side by side in the pool
its keys and values are read through one strided view, without a copy; else they are gathered.

Batch invariance (`KVWidths`, `row_multiple`): torch computes a tile's scores and its weighted sum
with GEMMs whose result for one query does not depend on which other queries are in the call, if
the call has enough of them, nor on masked columns after the query's own, if the number of columns
is one of those for which the library sums in the same order. Which numbers these are is found by
measurement (`baton.engine.invariance`), so all a query needs is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.kernels.paged_rows import PagedRow, num_blocks_used

_TILE = 64  # queries per call: fewer columns wasted above the diagonal than larger, as fast
KV_TILE = 512  # columns that torch's flash attention takes at a time
_AFTER = KV_TILE + _TILE + 4  # columns right of its first query that any call can have


@dataclass(frozen=True, slots=True)
class Invariance:
    """How calls must be padded so that a query's bits depend on nothing else.

    widths: increasing; a call's number of columns modulo KV_TILE is rounded up to one of them.
    row_multiple: the number of queries of a call is rounded up to a multiple.
    """

    widths: tuple[int, ...] = (KV_TILE,)
    row_multiple: int = 4

    def pad_columns(self, num_columns: int) -> int:
        whole, rest = divmod(num_columns - 1, KV_TILE)
        return whole * KV_TILE + next(width for width in self.widths if width > rest)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries [start, stop) of the step see columns [first, last) of their row's KV."""

    start: int
    stop: int
    first: int
    last: int
    mask: Tensor | None  # [stop - start or more, last - first], 0 or -inf


@dataclass(frozen=True, slots=True)
class _Row:
    """A row's KV: `num_slots` slots from `slot` on, or these blocks where they are scattered. The
    columns of its tiles count from there."""

    slot: int
    num_slots: int
    blocks: Tensor | None
    tiles: tuple[_Tile, ...]


class CpuAttention:
    """Plans and runs attention for one model; keeps the masks, which only depend on sizes."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        invariance: Invariance | None = None,
    ) -> None:
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._group_size = num_heads // num_kv_heads
        self._scale = head_dim**-0.5
        self._dtype = dtype
        self._invariance = invariance
        self._masks: dict[int, Tensor] = {}  # window → see _mask

    def plan(self, rows: Sequence[PagedRow], kv_cache: Tensor, window: int) -> list[_Row]:
        """`kv_cache` as in `paged_decode`; the plan holds for every layer with this window."""
        planned, start = [], 0
        for row in rows:
            planned.append(self._plan_row(row, start, kv_cache, window))
            start += row.num_queries
        return planned

    def run(self, q: Tensor, kv_cache: Tensor, plan: Sequence[_Row]) -> Tensor:
        """q: [num_tokens, num_heads, head_dim], contiguous → the same shape."""
        num_tokens, _, head_dim = q.shape
        out = torch.empty_like(q)
        grouped = (num_tokens, self._num_kv_heads, self._group_size, head_dim)
        q, seen = q.view(grouped), out.view(grouped)
        slots = kv_cache.flatten(1, 2)  # [2, num_slots, num_kv_heads, head_dim]
        for row in plan:
            if row.blocks is None:
                keys_values = slots[:, row.slot : row.slot + row.num_slots]
            else:
                keys_values = kv_cache.index_select(1, row.blocks).flatten(1, 2)
            # each [num_kv_heads, 1, columns, head_dim]
            keys, values = keys_values.permute(0, 2, 1, 3).unsqueeze(2).unbind()
            for tile in row.tiles:
                attend = self._attend_one if tile.stop - tile.start == 1 else self._attend
                k, v = keys[:, :, tile.first : tile.last], values[:, :, tile.first : tile.last]
                attend(q[tile.start : tile.stop], k, v, tile.mask, seen[tile.start : tile.stop])
        return out

    def _attend_one(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor
    ) -> None:
        """One query: the heads that share K and V are the rows of one GEMM."""
        q = q.transpose(0, 1)  # [num_kv_heads, 1, group, head_dim]
        missing = self._missing_rows(self._group_size)
        if missing:
            q = F.pad(q, (0, 0, 0, missing))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)
        out.copy_(o[:, :, : self._group_size].transpose(0, 1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor) -> None:
        """Several queries: each head of a group on its own, with the same mask."""
        num_queries = q.shape[0]
        q = q.permute(1, 2, 0, 3)  # [num_kv_heads, group, queries, head_dim]
        missing = self._missing_rows(num_queries)
        if missing:
            q = F.pad(q, (0, 0, 0, missing))
        k, v = (t.expand(-1, self._group_size, -1, -1) for t in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)
        out.copy_(o[:, :, :num_queries].permute(2, 0, 1, 3))

    def _missing_rows(self, num_rows: int) -> int:
        return -num_rows % self._invariance.row_multiple if self._invariance else 0

    def _plan_row(self, row: PagedRow, start: int, kv_cache: Tensor, window: int) -> _Row:
        block_size = kv_cache.shape[2]
        first_seen = self._first_column(row.start, window)
        base = first_seen // block_size * block_size
        tiles = []
        for offset in range(0, row.num_queries, _TILE):
            num_queries = min(_TILE, row.num_queries - offset)
            position = row.start + offset
            tiles.append(self._plan_tile(start + offset, num_queries, position, base, window))
        num_columns = max(tile.last for tile in tiles)
        blocks = row.block_ids[base // block_size : num_blocks_used(row, block_size)]
        return _place(blocks, num_columns, kv_cache, tuple(tiles))

    def _first_column(self, position: int, window: int) -> int:
        first = max(0, position - window + 1) if window else 0
        return first // KV_TILE * KV_TILE if self._invariance else first

    def _plan_tile(
        self, start: int, num_queries: int, position: int, base: int, window: int
    ) -> _Tile:
        first, last = self._first_column(position, window), position + num_queries
        if self._invariance:
            last = first + self._invariance.pad_columns(last - first)
        stop = start + num_queries
        is_all_seen = last == position + 1 and (not window or last - first <= window)
        if num_queries == 1 and is_all_seen:
            return _Tile(start, stop, first - base, last - base, None)
        num_rows = 1 if num_queries == 1 else num_queries + self._missing_rows(num_queries)
        mask = self._mask(num_rows, position, first, last, window)
        return _Tile(start, stop, first - base, last - base, mask)

    def _mask(self, num_rows: int, position: int, first: int, last: int, window: int) -> Tensor:
        """[num_rows, last - first]: a view of one staircase that serves every position.

        staircase[i, j] is what a query at i sees of a key at j - origin: only distances matter.
        """
        staircase = self._masks.get(window)
        before = max(position - first, 0)  # columns left of the first query
        after = max(last - position, _TILE + 4)
        if staircase is None or before > self._origin(staircase):
            origin = max(1024, 1 << (before - 1).bit_length()) if before else 1024
            staircase = self._build_staircase(origin, window)
            self._masks[window] = staircase
        assert after <= _AFTER
        left = self._origin(staircase) - (position - first)
        return staircase[:num_rows, left : left + last - first]

    def _origin(self, staircase: Tensor) -> int:
        return staircase.shape[1] - _AFTER

    def _build_staircase(self, origin: int, window: int) -> Tensor:
        rows = torch.arange(_TILE + 4)[:, None]
        distance = rows - (torch.arange(origin + _AFTER)[None, :] - origin)
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        zeros = torch.zeros(hidden.shape, dtype=self._dtype)
        return zeros.masked_fill_(hidden, float("-inf"))


def _place(
    block_ids: Sequence[int], num_columns: int, kv_cache: Tensor, tiles: tuple[_Tile, ...]
) -> _Row:
    """Where the KV in these blocks is. Columns past it lie in other blocks, or repeat the last one:
    they are masked, and finite."""
    num_blocks, block_size = kv_cache.shape[1:3]
    slot = block_ids[0] * block_size
    is_run = block_ids[-1] - block_ids[0] == len(block_ids) - 1 and all(
        b == a + 1 for a, b in pairwise(block_ids)
    )
    if is_run and slot + num_columns <= num_blocks * block_size:
        return _Row(slot, num_columns, None, tiles)
    missing = -(-num_columns // block_size) - len(block_ids)
    return _Row(0, num_columns, torch.tensor([*block_ids, *[block_ids[-1]] * missing]), tiles)
