"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32.

    Args:
        x: [..., dim], any float dtype.
        weight: [dim], dtype of x.

    Returns: like x, contiguous.
    """
    if x.is_cuda:
        from baton.kernels.rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch; on CPU also the one that is used."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
