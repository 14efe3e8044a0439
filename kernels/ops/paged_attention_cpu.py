"""Paged attention on CPU: torch's flash attention over views of the pool. For what
`paged_attention_native` does not do: other dtypes than float32, or where it was not built.

A step is planned once and run for every layer. Where a row's blocks lie side by side in the pool
its keys and values are read through a strided view, without a copy; else they are gathered. Rows
with one query and a context of up to about a thousand tokens are gathered together, by length, and
computed in one call: reading the pool in order and then computing in cache is faster there than one
call for each row that reads it head by head (docs/performance.md).

Columns past a row's context are masked, whatever is there; nothing but finite numbers may be.

Batch invariance: for one query, the bits of a call do not depend on the other queries, if there are
enough of them, nor on masked columns after its own, if their number is one for which the library
sums in the same order. Which numbers these are is found by measurement (`baton.engine.invariance`);
then padding is all it takes.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.kernels.paged_rows import PagedRow, num_blocks_used

_TILE = 64  # queries per call: fewer columns wasted above the diagonal than larger, as fast
_GATHERED = (128, 256, 512, 1024)  # contexts up to these are gathered together
KV_TILE = 512  # columns that torch's flash attention takes at a time
_AFTER = KV_TILE + _TILE + 32  # columns right of its first query that any call can have


@dataclass(frozen=True, slots=True)
class Invariance:
    """How calls must be padded so that a query's bits depend on nothing else.

    widths: increasing, up to KV_TILE; a call's number of columns, modulo KV_TILE, is rounded up to
        one of them.
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
    """A row's KV: slots from `slot` on, or these blocks where they are scattered. The columns of
    its tiles count from there."""

    slot: int
    blocks: Tensor | None
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows with one query each, computed in one call."""

    queries: Tensor  # [num_rows] int64, indices among the step's queries
    blocks: Tensor  # [num_rows * blocks per row] int64
    mask: Tensor  # [num_rows, 1, 1, columns], 0 or -inf


@dataclass(frozen=True, slots=True)
class CpuPlan:
    groups: tuple[_Group, ...]
    rows: tuple[_Row, ...]


class CpuAttention:
    """Plans and runs attention for one model; keeps masks, which depend on nothing but sizes."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        invariance: Invariance | None = None,
    ) -> None:
        self._num_kv_heads = num_kv_heads
        self._group_size = num_heads // num_kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5
        self._dtype = dtype
        self._invariance = invariance
        self._staircases: dict[int, Tensor] = {}  # window → see _mask

    # ── run ──────────────────────────────────────────────────────────────────────────────────────

    def run(self, q: Tensor, kv_cache: Tensor, plan: CpuPlan) -> Tensor:
        """One layer.

        Args:
            q: [num_tokens, num_heads, head_dim], the last two dimensions contiguous.
            kv_cache: as in `paged_decode`.

        Returns: [num_tokens, num_heads, head_dim].
        """
        shape = q.shape
        q = q.view(shape[0], self._num_kv_heads, self._group_size, self._head_dim)
        if len(plan.groups) == 1 and not plan.rows:
            return self._attend_group(q, kv_cache, plan.groups[0]).reshape(shape)
        seen = q.new_empty(q.shape)
        for group in plan.groups:
            of_group = q.index_select(0, group.queries)
            seen.index_copy_(0, group.queries, self._attend_group(of_group, kv_cache, group))
        for row in plan.rows:
            kv = kv_cache if row.blocks is None else kv_cache.index_select(1, row.blocks)
            for tile in row.tiles:
                k, v = (self._columns(kv, i, row.slot + tile.first, tile) for i in (0, 1))
                self._attend(q[tile.start : tile.stop], k, v, tile, seen[tile.start : tile.stop])
        return seen.view(shape)

    def _attend_group(self, q: Tensor, kv_cache: Tensor, group: _Group) -> Tensor:
        """q and the result: [num_rows, num_kv_heads, group_size, head_dim]."""
        gathered = kv_cache.index_select(1, group.blocks)
        shape = (2, q.shape[0], -1, self._num_kv_heads, self._head_dim)
        k, v = gathered.view(shape)[:, :, : group.mask.shape[3]].transpose(2, 3).unbind()
        return self._flash(q, k, v, group.mask)[:, :, : self._group_size]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tile: _Tile, out: Tensor) -> None:
        if q.shape[0] == 1:  # the heads that share K and V are the rows of one GEMM
            o = self._flash(q.transpose(0, 1), k, v, tile.mask)
            out.copy_(o[:, :, : self._group_size].transpose(0, 1))
        else:  # each head of a group on its own, with the same mask
            k, v = (t.expand(-1, self._group_size, -1, -1) for t in (k, v))
            o = self._flash(q.permute(1, 2, 0, 3), k, v, tile.mask)
            out.copy_(o[:, :, : q.shape[0]].permute(2, 0, 1, 3))

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        missing = self._missing_rows(q.shape[2])
        if missing:
            q = F.pad(q, (0, 0, 0, missing))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)

    def _columns(self, kv: Tensor, which: int, slot: int, tile: _Tile) -> Tensor:
        """K (0) or V (1) of a tile: [num_kv_heads, 1, columns, head_dim]."""
        token = self._num_kv_heads * self._head_dim
        offset = kv.storage_offset() + which * kv.stride(0) + slot * token
        shape = (self._num_kv_heads, 1, tile.last - tile.first, self._head_dim)
        return kv.as_strided(shape, (self._head_dim, 0, token, 1), offset)

    def _missing_rows(self, num_rows: int) -> int:
        return -num_rows % self._invariance.row_multiple if self._invariance else 0

    # ── plan ─────────────────────────────────────────────────────────────────────────────────────

    def plan(self, rows: Sequence[PagedRow], kv_cache: Tensor, window: int) -> CpuPlan:
        """For every layer with this window."""
        together: dict[int, list[tuple[int, PagedRow]]] = defaultdict(list)
        alone, start = [], 0
        for row in rows:
            if row.num_queries == 1 and row.context_len <= _GATHERED[-1]:
                together[bisect_left(_GATHERED, row.context_len)].append((start, row))
            else:
                alone.append(self._plan_row(row, start, kv_cache, window))
            start += row.num_queries
        block_size = kv_cache.shape[2]
        groups = [self._plan_group(group, block_size, window) for group in together.values()]
        return CpuPlan(tuple(groups), tuple(alone))

    def _plan_group(
        self, rows: Sequence[tuple[int, PagedRow]], block_size: int, window: int
    ) -> _Group:
        num_columns = self._pad_columns(max(row.context_len for _, row in rows))
        num_blocks = -(-num_columns // block_size)
        blocks = []
        for _, row in rows:
            used = row.block_ids[: num_blocks_used(row, block_size)]
            blocks += [*used, *[used[-1]] * (num_blocks - len(used))]
        distance = torch.tensor([[row.start] for _, row in rows]) - torch.arange(num_columns)
        mask = _hide(distance, window, self._dtype)[:, None, None]
        queries = torch.tensor([query for query, _ in rows])
        return _Group(queries, torch.tensor(blocks), mask)

    def _plan_row(self, row: PagedRow, start: int, kv_cache: Tensor, window: int) -> _Row:
        block_size = kv_cache.shape[2]
        base = self._first_column(row.start, window) // block_size * block_size
        tiles = []
        for offset in range(0, row.num_queries, _TILE):
            num_queries = min(_TILE, row.num_queries - offset)
            position = row.start + offset
            tiles.append(self._plan_tile(start + offset, num_queries, position, base, window))
        num_columns = max(tile.last for tile in tiles)
        blocks = row.block_ids[base // block_size : num_blocks_used(row, block_size)]
        return _place(blocks, num_columns, kv_cache, tuple(tiles))

    def _plan_tile(
        self, start: int, num_queries: int, position: int, base: int, window: int
    ) -> _Tile:
        first = self._first_column(position, window)
        last = first + self._pad_columns(position + num_queries - first)
        is_all_seen = last == position + 1 and (not window or last - first <= window)
        mask = None
        if num_queries > 1 or not is_all_seen:
            num_rows = 1 if num_queries == 1 else num_queries + self._missing_rows(num_queries)
            mask = self._mask(num_rows, position, first, last, window)
        return _Tile(start, start + num_queries, first - base, last - base, mask)

    def _first_column(self, position: int, window: int) -> int:
        first = max(0, position - window + 1) if window else 0
        return first // KV_TILE * KV_TILE if self._invariance else first

    def _pad_columns(self, num_columns: int) -> int:
        return self._invariance.pad_columns(num_columns) if self._invariance else num_columns

    def _mask(self, num_rows: int, position: int, first: int, last: int, window: int) -> Tensor:
        """[num_rows, last - first]: a view of one staircase that serves every position, since what
        a query sees depends on distances alone."""
        before = position - first  # columns left of the first query's own
        staircase = self._staircases.get(window)
        if staircase is None or before > staircase.shape[1] - _AFTER:
            origin = max(1024, 1 << before.bit_length())
            distance = torch.arange(_AFTER - KV_TILE)[:, None] + origin
            distance = distance - torch.arange(origin + _AFTER)
            staircase = _hide(distance, window, self._dtype)
            self._staircases[window] = staircase
        left = staircase.shape[1] - _AFTER - before
        return staircase[:num_rows, left : left + last - first]


def _hide(distance: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key this far behind it, else -inf."""
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _place(
    block_ids: Sequence[int], num_columns: int, kv_cache: Tensor, tiles: tuple[_Tile, ...]
) -> _Row:
    """Where the KV in these blocks is; columns past it lie in other blocks or repeat the last."""
    num_blocks, block_size = kv_cache.shape[1:3]
    slot = block_ids[0] * block_size
    is_run = block_ids[-1] - block_ids[0] == len(block_ids) - 1 and all(
        b == a + 1 for a, b in pairwise(block_ids)
    )
    if is_run and slot + num_columns <= num_blocks * block_size:
        return _Row(slot, None, tiles)
    missing = -(-num_columns // block_size) - len(block_ids)
    return _Row(0, torch.tensor([*block_ids, *[block_ids[-1]] * missing]), tiles)
