"""The Triton kernel behind `baton.kernels.kv_pack`: both directions are one tiled copy of rows."""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.types import KVRange

_TILE_WORDS = 4096


# What differs from frame to frame is not compiled in: a compilation takes as long as many frames.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_tokens",
        "num_slots",
        "layer_start",
        "token_start",
        "head_start",
    ]
)
def _copy_kv_kernel(
    cache_ptr,  # words of [num_layers, 2, num_slots, cache_row]
    wire_ptr,  # words of [layers, tokens, 2, row]
    block_ids_ptr,  # [blocks with tokens of the range] int32
    num_rows,  # layers * tokens * 2
    num_tokens,
    num_slots,
    layer_start,
    token_start,  # in the first of these blocks
    head_start,
    block_size: tl.constexpr,
    head_words: tl.constexpr,
    cache_row: tl.constexpr,  # words of one token's K (or V), all heads
    row: tl.constexpr,  # words of one token's K (or V), heads of the range
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    PACK: tl.constexpr,
):
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = tl.program_id(1) * TILE_COLS + tl.arange(0, TILE_COLS)
    kv = rows % 2
    token = (rows // 2) % num_tokens
    layer = rows // (2 * num_tokens) + layer_start
    position = token + token_start
    in_range = rows < num_rows
    block = tl.load(block_ids_ptr + position // block_size, mask=in_range, other=0)
    slot = block.to(tl.int64) * block_size + position % block_size
    cache_at = ((layer.to(tl.int64) * 2 + kv) * num_slots + slot) * cache_row
    cache_at = cache_at[:, None] + head_start * head_words + cols[None, :]
    wire_at = rows.to(tl.int64)[:, None] * row + cols[None, :]
    mask = in_range[:, None] & (cols < row)[None, :]
    if PACK:
        tl.store(wire_ptr + wire_at, tl.load(cache_ptr + cache_at, mask=mask), mask=mask)
    else:
        tl.store(cache_ptr + cache_at, tl.load(wire_ptr + wire_at, mask=mask), mask=mask)


def copy_kv_triton(
    kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, wire: Tensor, *, pack: bool
) -> None:
    """`pack_kv` (pack=True) or `unpack_kv`; the caller has checked the arguments."""
    _, _, num_blocks, block_size, num_kv_heads, head_dim = kv_cache.shape
    heads = (where.head_start, where.head_stop) if where.head_stop else (0, num_kv_heads)
    head_bytes = head_dim * kv_cache.element_size()
    word = torch.int32 if head_bytes % 4 == 0 else torch.int16
    head_words = head_bytes // word.itemsize
    row = (heads[1] - heads[0]) * head_words
    tile_cols = min(triton.next_power_of_2(row), _TILE_WORDS)
    tile_rows = _TILE_WORDS // tile_cols
    num_rows = where.num_layers * where.num_tokens * 2
    first_block = where.token_start // block_size
    used = block_ids[first_block : -(-where.token_stop // block_size)]
    blocks = torch.tensor(used, dtype=torch.int32, device=kv_cache.device)
    grid = (triton.cdiv(num_rows, tile_rows), triton.cdiv(row, tile_cols))
    _copy_kv_kernel[grid](
        kv_cache.view(word),
        wire.view(word),
        blocks,
        num_rows,
        where.num_tokens,
        num_blocks * block_size,
        where.layer_start,
        where.token_start - first_block * block_size,
        heads[0],
        block_size=block_size,
        head_words=head_words,
        cache_row=num_kv_heads * head_words,
        row=row,
        TILE_ROWS=tile_rows,
        TILE_COLS=tile_cols,
        PACK=pack,
    )
