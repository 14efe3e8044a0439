"""What stands between the products of a gated MLP."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32.

    Args:
        x: [num_tokens, 2 * size], gate and up side by side; contiguous.

    Returns: [num_tokens, size], dtype of x.
    """
    if x.is_cuda:
        from baton.kernels.silu_mul_triton import silu_mul_triton

        return silu_mul_triton(x)
    return silu_mul_torch(x)


def silu_mul_torch(x: Tensor) -> Tensor:
    """`silu_mul` in plain torch, on any device."""
    gate, up = x.float().chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(x.dtype)
