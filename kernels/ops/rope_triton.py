"""The Triton kernel behind `rope`: one program rotates a few heads of one token."""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_kernel(
    x_ptr,  # [num_tokens, num_heads, head_dim], the last two dimensions contiguous
    cos_sin_ptr,  # [num_tokens, 2, head_dim] float32: (cos, cos), (-sin, sin)
    out_ptr,  # [num_tokens, num_heads, head_dim], contiguous
    token_stride,
    num_heads,
    half: tl.constexpr,  # head_dim / 2
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, TILE)
    in_half = cols < half
    cos = tl.load(cos_sin_ptr + token * (4 * half) + cols, mask=in_half, other=0.0)
    sin = tl.load(cos_sin_ptr + token * (4 * half) + 3 * half + cols, mask=in_half, other=0.0)
    at = heads[:, None] * (2 * half) + cols[None, :]
    mask = (heads < num_heads)[:, None] & in_half[None, :]
    x_ptr += token * token_stride
    x1 = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
    out_ptr += token * num_heads * (2 * half)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, (x1 * cos[None, :] - x2 * sin[None, :]).to(kind), mask=mask)
    tl.store(out_ptr + at + half, (x2 * cos[None, :] + x1 * sin[None, :]).to(kind), mask=mask)


def rope_triton(x: Tensor, cos_sin: Tensor) -> Tensor:
    """See `rope`."""
    num_tokens, num_heads, head_dim = x.shape
    assert x.stride()[1:] == (head_dim, 1), "the heads of a token must be contiguous"
    assert cos_sin.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = triton.next_power_of_2(head_dim // 2)
    heads = max(1, min(triton.next_power_of_2(num_heads), 2048 // tile))
    if num_tokens:
        _rope_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
            x, cos_sin, out, x.stride(0), num_heads, half=head_dim // 2, TILE=tile, HEADS=heads
        )
    return out
