"""The Triton kernels behind `paged_decode`: split-KV attention (flash decoding, Dao et al., 2023).

One program takes the query heads of one KV head and a share of the row's context, and leaves an
unnormalised sum with its running maximum; a second kernel merges the shares. With few rows the
splits are what fills the GPU.
"""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_MIN_SPLIT = 256  # keys; less is not worth a program
_MAX_SPLITS = 64  # a power of two
_PROGRAMS = 2048  # a few waves on a large GPU, so that the last one costs little


class Tiles(NamedTuple):
    """How the kernel is compiled; every entry of `tiles_for` fits registers and shared memory."""

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
        return Tiles(32, 4, 3) if dims <= 128 else Tiles(16, 4, 3)
    return Tiles(64, 4, 3) if dims <= 128 else Tiles(32, 4, 3)


# What differs from step to step is not compiled in: a compilation stops everyone for seconds.
@triton.jit(
    do_not_specialize=["max_blocks", "window", "num_splits"],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr"],
)
def _decode_kernel(
    q_ptr,  # [num_rows, num_heads, head_dim], strided in the first dimension
    cache_ptr,  # [2, num_slots, num_kv_heads, head_dim]
    table_ptr,  # [num_rows, max_blocks] int32
    lens_ptr,  # [num_rows] int32
    sums_ptr,  # [num_rows, num_heads, num_splits, head_dim] float32
    maxima_ptr,  # [num_rows, num_heads, num_splits] float32, base 2
    totals_ptr,  # [num_rows, num_heads, num_splits] float32
    q_stride,
    max_blocks,
    num_slots,
    scale_log2,  # scale * log2(e)
    window,
    num_splits,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context_len = tl.load(lens_ptr + row)
    first_seen = tl.where(window > 0, tl.maximum(context_len - window, 0), 0)
    per_split = tl.cdiv(tl.cdiv(context_len - first_seen, num_splits), KEYS) * KEYS
    start = first_seen + split * per_split
    stop = tl.minimum(start + per_split, context_len)

    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIMS)
    in_group = heads < group_size
    in_head = dims < head_dim
    q_at = (kv_head * group_size + heads)[:, None] * head_dim + dims[None, :]
    q_mask = in_group[:, None] & in_head[None, :]
    q = tl.load(q_ptr + row * q_stride + q_at, mask=q_mask, other=0.0)

    maximum = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, DIMS), tl.float32)
    v_ptr = cache_ptr + num_slots.to(tl.int64) * (num_kv_heads * head_dim)
    for tile in range(start, stop, KEYS):
        tokens = tile + tl.arange(0, KEYS)
        seen = tokens < stop
        block = tl.load(table_ptr + row * max_blocks + tokens // block_size, mask=seen, other=0)
        slot = block.to(tl.int64) * block_size + tokens % block_size
        at = (slot * num_kv_heads + kv_head)[:, None] * head_dim + dims[None, :]
        mask = seen[:, None] & in_head[None, :]
        k = tl.load(cache_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        seen_values = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        acc = acc * shrink[:, None] + seen_values
        maximum = new_maximum

    partial = (row * num_kv_heads * group_size + kv_head * group_size + heads) * num_splits + split
    tl.store(sums_ptr + partial[:, None] * head_dim + dims[None, :], acc, mask=q_mask)
    tl.store(maxima_ptr + partial, maximum, mask=in_group)
    tl.store(totals_ptr + partial, total, mask=in_group)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    sums_ptr,  # as left by _decode_kernel; an empty share has maximum -inf and total 0
    maxima_ptr,
    totals_ptr,
    out_ptr,  # [num_rows * num_heads, head_dim], contiguous
    num_splits,
    head_dim: tl.constexpr,
    DIMS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, MAX_SPLITS)
    dims = tl.arange(0, DIMS)
    in_head = dims < head_dim
    first = head * num_splits
    maxima = tl.load(maxima_ptr + first + splits, mask=splits < num_splits, other=float("-inf"))
    maximum = tl.max(maxima, 0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)  # a row without context
    total = 0.0
    acc = tl.zeros((DIMS,), tl.float32)
    for at in range(first, first + num_splits):
        weight = tl.exp2(tl.load(maxima_ptr + at) - maximum)
        total += tl.load(totals_ptr + at) * weight
        acc += tl.load(sums_ptr + at * head_dim + dims, mask=in_head, other=0.0) * weight
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * head_dim + dims, out.to(out_ptr.dtype.element_ty), mask=in_head)


def paged_decode_triton(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """See `paged_decode`."""
    num_rows, num_heads, head_dim = q.shape
    _, num_blocks, block_size, num_kv_heads, _ = kv_cache.shape
    assert q.stride()[1:] == (head_dim, 1), "the heads of a query must be contiguous"
    assert kv_cache.is_contiguous()
    assert block_table.stride(1) == 1
    max_context = min(block_table.shape[1] * block_size, window or 1 << 30)
    num_splits = min(
        triton.cdiv(max_context, _MIN_SPLIT),
        triton.cdiv(_PROGRAMS, num_rows * num_kv_heads),
        _MAX_SPLITS,
    )
    shares = (num_rows, num_heads, num_splits)
    sums = torch.empty((*shares, head_dim), dtype=torch.float32, device=q.device)
    maxima, totals = torch.empty((2, *shares), dtype=torch.float32, device=q.device)
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    group_size = num_heads // num_kv_heads
    dims = max(16, triton.next_power_of_2(head_dim))
    tiles = tiles_for(dims, q.dtype)
    _decode_kernel[(num_rows, num_kv_heads, num_splits)](
        q,
        kv_cache,
        block_table,
        context_lens,
        sums,
        maxima,
        totals,
        q.stride(0),
        block_table.stride(0),
        num_blocks * block_size,
        scale * 1.4426950408889634,
        window,
        num_splits,
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        head_dim=head_dim,
        block_size=block_size,
        HEADS=max(16, triton.next_power_of_2(group_size)),
        DIMS=dims,
        KEYS=tiles.keys,
        PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    _merge_kernel[(num_rows * num_heads,)](
        sums,
        maxima,
        totals,
        out,
        num_splits,
        head_dim=head_dim,
        DIMS=dims,
        MAX_SPLITS=_MAX_SPLITS,
        num_warps=1 if dims <= 128 else 2,
    )
    return out
