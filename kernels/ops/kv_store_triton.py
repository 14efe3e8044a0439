"""The Triton kernel behind `kv_store`: one program copies one token's K and V."""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kv_store_kernel(
    k_ptr,  # [num_tokens, row], strided in the first dimension
    v_ptr,
    cache_ptr,  # [2, num_slots, row]
    slots_ptr,  # [num_tokens] int64; negative = stored nowhere
    k_stride,
    v_stride,
    num_slots,
    row: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, TILE)
    inside = cols < row
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    k = tl.load(k_ptr + token * k_stride + cols, mask=inside)
    v = tl.load(v_ptr + token * v_stride + cols, mask=inside)
    tl.store(cache_ptr + slot * row + cols, k, mask=inside)
    tl.store(cache_ptr + (num_slots + slot) * row + cols, v, mask=inside)


def kv_store_triton(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """See `kv_store`."""
    num_tokens, num_heads, head_dim = k.shape
    row = num_heads * head_dim
    for x in (k, v):
        assert x.stride()[1:] == (head_dim, 1), "a token's heads must be contiguous"
        assert x.dtype is kv_cache.dtype
    assert kv_cache.is_contiguous()
    if num_tokens:
        _kv_store_kernel[(num_tokens,)](
            k,
            v,
            kv_cache,
            slots,
            k.stride(0),
            v.stride(0),
            kv_cache.shape[1] * kv_cache.shape[2],
            row=row,
            TILE=triton.next_power_of_2(row),
        )
