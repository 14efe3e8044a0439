"""Same bits for a row whatever else is in the batch (`--batch-invariant`), by measurement.

Numbers of rows and columns decide which kernels the libraries use and how they split sums, and
with it the last bits. Padding a call to the right size avoids that at little cost. Which sizes are
right depends on processor and libraries, so it is found at start: each probe compares calls of many
sizes with a large one, bit for bit. Where nothing helps, the mode is refused.

The other ops of a step (embedding, RMSNorm, RoPE, silu · up and residual, which ride on GEMMs)
compute each row by itself; tests/engine/test_invariance.py checks the whole step.
"""

import logging
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.layers.linear import Linear
from baton.engine.model_config import ModelConfig
from baton.errors import InvalidRequest
from baton.kernels.paged_attention_cpu import KV_TILE, Invariance

log = logging.getLogger(__name__)

_STEP = 16  # columns; blocks are a multiple
_ROWS = 64  # of the call that the others are compared with
_SMALL_ROWS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 33, 48, 63)
_SAMPLED_FEATURES = 4096  # a wide layer is probed up to here; its columns are computed alike


def probe_invariance(config: ModelConfig, dtype: torch.dtype) -> Invariance:
    """How attention calls must be padded on this machine.

    Raises:
        InvalidRequest: no padding makes attention batch-invariant here.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, 2 * KV_TILE, config.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    for row_multiple in (1, 2, 4, 8, 16, 32):
        sizes = range(row_multiple, _ROWS, row_multiple)
        if _are_equal_rows(q, k, v, sizes):
            widths = tuple(w for w in range(_STEP, KV_TILE, _STEP) if _is_equal_width(q, k, v, w))
            return Invariance((*widths, KV_TILE), row_multiple)
    raise InvalidRequest("attention cannot be made batch-invariant here", "batch_invariant")


def _are_equal_rows(q: Tensor, k: Tensor, v: Tensor, sizes: Iterable[int]) -> bool:
    k, v = k[:, :, :KV_TILE], v[:, :, :KV_TILE]
    reference = F.scaled_dot_product_attention(q[:, :, :_ROWS], k, v)
    return all(
        torch.equal(F.scaled_dot_product_attention(q[:, :, :n], k, v), reference[:, :, :n])
        for n in sizes
    )


def _is_equal_width(q: Tensor, k: Tensor, v: Tensor, width: int) -> bool:
    """Whether `width` columns give the bits of KV_TILE of them, the rest masked; also as the second
    tile of a call."""
    q = q[:, :, :_ROWS]
    for before in (0, KV_TILE):
        whole, part = before + KV_TILE, before + width
        mask = torch.zeros(1, whole, dtype=q.dtype)
        mask[:, part:] = float("-inf")
        padded = F.scaled_dot_product_attention(q, k[:, :, :whole], v[:, :, :whole], attn_mask=mask)
        exact = F.scaled_dot_product_attention(q, k[:, :, :part], v[:, :, :part])
        if not torch.equal(padded, exact):
            return False
    return True


def pad_linears(linears: Iterable[Linear], dtype: torch.dtype) -> None:
    """Set the fewest rows that each layer computes with, so that rows do not matter.

    Raises:
        InvalidRequest: a layer cannot be made batch-invariant here.
    """
    known: dict[tuple[int, int], int] = {}
    for linear in linears:
        shape = (linear.out_features, linear.in_features)
        if shape not in known:
            known[shape] = _fewest_rows(linear, dtype)
        linear.min_rows = known[shape]


def _fewest_rows(linear: Linear, dtype: torch.dtype) -> int:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_ROWS, linear.in_features), generator=generator).to(dtype)
    reference = linear(x)
    equal = {n for n in _SMALL_ROWS if torch.equal(linear(x[:n]), reference[:n])}
    for fewest in (1, 2, 4, 8, 16):
        if all(n in equal for n in _SMALL_ROWS if n >= fewest) and linear.is_packed:
            return fewest
    shape = f"{linear.out_features}x{linear.in_features}"
    raise InvalidRequest(
        f"linear layers of {shape} cannot be made batch-invariant here", "batch_invariant"
    )
