"""Rotate queries and keys by their positions; halves of a head form the pairs."""

from torch import Tensor


def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """(x₁, x₂) → (x₁ cos - x₂ sin, x₂ cos + x₁ sin), computed in float32.

    Args:
        x: [num_tokens, num_heads, head_dim], the last two dimensions contiguous.
        cos_sin: [num_tokens, 2, head_dim] float32: (cos, cos) and (-sin, sin) of each position.

    Returns: like x, contiguous.
    """
    if x.is_cuda:
        from baton.kernels.rope_triton import rope_triton

        return rope_triton(x, cos_sin)
    return rope_torch(x, cos_sin)


def rope_torch(x: Tensor, cos_sin: Tensor) -> Tensor:
    """`rope` in plain torch; on CPU also the one that is used."""
    wide = x.float()
    swapped = wide.roll(x.shape[-1] // 2, dims=-1)
    rotated = (wide * cos_sin[:, :1]).add_(swapped.mul_(cos_sin[:, 1:]))
    return rotated.to(x.dtype)
