"""The Triton kernel behind `paged_prefill`: flash attention (Dao, 2023) over paged KV, for a prompt
or a chunk of one that follows cached context."""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """How the kernel is compiled; every entry of `tiles_for` fits registers and shared memory."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def tiles_for(dims: int, dtype: torch.dtype) -> Tiles:
    """dims: head_dim, rounded up to a power of two.

    float32 products are sums in registers (tensor cores would round their inputs to 10 bits), so
    its tiles are small: larger ones spill. Three stages, because two do not fetch the block ids
    of a tile ahead.
    """
    if dtype is torch.float32:
        if dims <= 64:
            return Tiles(32, 32, 4, 2)
        return Tiles(16, 32, 8, 2) if dims <= 128 else Tiles(16, 32, 8, 1)
    return Tiles(128, 64, 8, 3) if dims <= 128 else Tiles(64, 32, 8, 3)


@triton.jit
def _attend(
    maximum,  # [QUERIES] largest score so far, base 2
    total,  # [QUERIES] sum of weights
    acc,  # [QUERIES, DIMS] sum of weighted values
    q,
    k_ptr,  # of this KV head in slot 0
    v_ptr,
    table_ptr,  # of this row
    start,
    stop,
    positions,  # of the queries
    scale_log2,
    window,
    slot_stride: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,  # False: all queries see all keys in [start, stop), which divides by KEYS
):
    dims = tl.arange(0, DIMS)
    for tile in range(start, stop, KEYS):
        keys = tile + tl.arange(0, KEYS)
        there = keys < stop
        if MASKED:
            block = tl.load(table_ptr + keys // block_size, mask=there, other=0)
        else:
            block = tl.load(table_ptr + keys // block_size)
        slot = block.to(tl.int64) * block_size + keys % block_size
        at = slot[:, None] * slot_stride + dims[None, :]
        if MASKED or head_dim != DIMS:
            mask = there[:, None] & (dims < head_dim)[None, :]
            k = tl.load(k_ptr + at, mask=mask, other=0.0)
        else:
            k = tl.load(k_ptr + at)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASKED:
            distance = positions[:, None] - keys[None, :]
            seen = (distance >= 0) & there[None, :]
            seen = seen & ((window <= 0) | (distance < window))
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        base = new_maximum
        if MASKED:
            # A query that has seen nothing yet (its window begins later): no -inf - -inf.
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(weights, 1)
        if MASKED or head_dim != DIMS:
            v = tl.load(v_ptr + at, mask=mask, other=0.0)
        else:
            v = tl.load(v_ptr + at)
        seen_values = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        acc = acc * shrink[:, None] + seen_values
        maximum = new_maximum
    return maximum, total, acc


# What differs from step to step is not compiled in: a compilation stops everyone for seconds.
@triton.jit(
    do_not_specialize=["max_blocks", "window"],
    do_not_specialize_on_alignment=["starts_ptr", "table_ptr", "lens_ptr"],
)
def _prefill_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim], strided in the first dimension
    cache_ptr,  # [2, num_slots, num_kv_heads, head_dim]
    starts_ptr,  # [num_rows + 1] int32
    table_ptr,  # [num_rows, max_blocks] int32
    lens_ptr,  # [num_rows] int32
    out_ptr,  # [num_tokens, num_heads, head_dim], contiguous
    q_stride,
    max_blocks,
    num_slots,
    scale_log2,  # scale * log2(e)
    window,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    QUERIES: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The tiles with the longest context first: the others fill the gaps at the end.
    tile_of_row = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first_query = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - first_query
    if tile_of_row * QUERIES >= num_queries:
        return
    context_len = tl.load(lens_ptr + row)
    offsets = tile_of_row * QUERIES + tl.arange(0, QUERIES)
    is_query = offsets < num_queries
    positions = context_len - num_queries + offsets
    dims = tl.arange(0, DIMS)
    in_head = dims < head_dim
    kv_head = head // (num_heads // num_kv_heads)
    token = (first_query + offsets).to(tl.int64)
    q_at = token[:, None] * q_stride + head * head_dim + dims[None, :]
    q_mask = is_query[:, None] & in_head[None, :]
    q = tl.load(q_ptr + q_at, mask=q_mask, other=0.0)

    first_position = context_len - num_queries + tile_of_row * QUERIES
    stop = tl.minimum(first_position + QUERIES, context_len)
    first_seen = tl.where(window > 0, tl.maximum(first_position - window + 1, 0), 0)
    start = first_seen // KEYS * KEYS
    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, DIMS), tl.float32)
    k_ptr = cache_ptr + kv_head * head_dim
    v_ptr = k_ptr + num_slots.to(tl.int64) * (num_kv_heads * head_dim)
    table_ptr += row * max_blocks
    masked_from = start
    if PRECISION != "ieee":  # float32 has registers for one loop alone
        # Every query of the tile sees all keys up to here; without a window, that is most of them.
        masked_from = tl.where(window > 0, start, (first_position + 1) // KEYS * KEYS)
        maximum, total, acc = _attend(
            maximum, total, acc, q, k_ptr, v_ptr, table_ptr, start, masked_from, positions,
            scale_log2, window, num_kv_heads * head_dim, head_dim, block_size, DIMS, KEYS,
            PRECISION, MASKED=False,
        )  # fmt: skip
    maximum, total, acc = _attend(
        maximum, total, acc, q, k_ptr, v_ptr, table_ptr, masked_from, stop, positions,
        scale_log2, window, num_kv_heads * head_dim, head_dim, block_size, DIMS, KEYS,
        PRECISION, MASKED=True,
    )  # fmt: skip

    out = acc / tl.where(is_query, total, 1.0)[:, None]
    out_at = (token[:, None] * num_heads + head) * head_dim + dims[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=q_mask)


def paged_prefill_triton(
    q: Tensor,
    kv_cache: Tensor,
    query_starts: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    """See `paged_prefill`."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows = block_table.shape[0]
    _, num_blocks, block_size, num_kv_heads, _ = kv_cache.shape
    assert q.stride()[1:] == (head_dim, 1), "the heads of a query must be contiguous"
    assert kv_cache.is_contiguous()
    assert block_table.stride(1) == 1
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    dims = max(16, triton.next_power_of_2(head_dim))
    tiles = tiles_for(dims, q.dtype)
    _prefill_kernel[(triton.cdiv(max_query_len, tiles.queries), num_heads, num_rows)](
        q,
        kv_cache,
        query_starts,
        block_table,
        context_lens,
        out,
        q.stride(0),
        block_table.stride(0),
        num_blocks * block_size,
        scale * 1.4426950408889634,
        window,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        QUERIES=tiles.queries,
        DIMS=dims,
        KEYS=tiles.keys,
        PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out
