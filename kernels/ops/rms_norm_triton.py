"""The Triton kernel behind `rms_norm`: one program per normalised vector."""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [num_rows, num_heads, dim], strided except in the last dimension
    weight_ptr,  # [dim]
    out_ptr,  # [num_rows, num_heads, dim], contiguous
    row_stride,
    head_stride,
    num_heads,
    eps,
    dim: tl.constexpr,
    TILE: tl.constexpr,
):
    vector = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, TILE)
    inside = cols < dim
    start = (vector // num_heads) * row_stride + (vector % num_heads) * head_stride
    x = tl.load(x_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / dim + eps)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + vector * dim + cols, out, mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` for x of two or three dimensions, the last contiguous."""
    assert x.dim() in (2, 3), "x must be [rows, dim] or [rows, heads, dim]"
    assert x.stride(-1) == 1, "the last dimension of x must be contiguous"
    rows = x if x.dim() == 3 else x.unsqueeze(1)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    num_rows, num_heads, dim = rows.shape
    tile = triton.next_power_of_2(dim)
    if num_rows:
        _rms_norm_kernel[(num_rows * num_heads,)](
            rows,
            weight,
            out,
            rows.stride(0),
            rows.stride(1),
            num_heads,
            eps,
            dim=dim,
            TILE=tile,
            num_warps=min(max(tile // 512, 1), 16),
        )
    return out.view(x.shape)
