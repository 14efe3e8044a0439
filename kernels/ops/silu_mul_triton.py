"""The Triton kernel behind `silu_mul`: one program takes a stretch of one token."""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


@triton.jit
def _silu_mul_kernel(
    x_ptr,  # [num_tokens, 2, size]
    out_ptr,  # [num_tokens, size]
    size: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = cols < size
    gate = tl.load(x_ptr + token * (2 * size) + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * (2 * size) + size + cols, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * size + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul_triton(x: Tensor) -> Tensor:
    """See `silu_mul`."""
    num_tokens, width = x.shape
    assert x.is_contiguous()
    out = torch.empty((num_tokens, width // 2), dtype=x.dtype, device=x.device)
    if num_tokens:
        _silu_mul_kernel[(num_tokens, triton.cdiv(width // 2, _TILE))](
            x, out, size=width // 2, TILE=_TILE, num_warps=4
        )
    return out
