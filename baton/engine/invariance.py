"""Same bits for a row whatever else is in the batch (`--batch-invariant`), by measurement.

Numbers of rows and columns decide which kernels the libraries use and how they split sums, and with
it the last bits. Padding a call to the right size avoids that at little cost. Which sizes are right
depends on processor and libraries, so it is found at start: each probe compares calls of many sizes
with a large one, bit for bit. Where nothing helps, the mode is refused.

Rounding to 16 bits hides most differences in a float32 sum, and shows the rest to whoever is
unlucky. The probes therefore compute sums that cancel: what is left of them is rounding error.

The other ops of a step (embedding, RMSNorm, RoPE, silu · up and residual, which ride on GEMMs)
compute each row by itself; tests/engine/test_invariance.py checks the whole step.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.layers.linear import Linear
from baton.errors import InvalidRequest
from baton.kernels.paged_attention_cpu import KV_TILE, Invariance

_STEP = 16  # columns; a block has a multiple
_ROWS = 64  # of the call of attention that the others are compared with
_MANY_ROWS = 160  # of that of a linear layer
_FEW_ROWS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 33, 48, 63)
_MULTIPLES = (1, 2, 4, 8, 16, 32)


@lru_cache(maxsize=8)
def probe_invariance(head_dim: int, dtype: torch.dtype) -> Invariance:
    """How attention calls must be padded on this machine; measured once per process.

    Raises:
        InvalidRequest: no padding makes attention batch-invariant here.
    """
    for multiple in _MULTIPLES:
        sizes = range(multiple, _ROWS, multiple)
        if all(_are_equal_rows(probe, sizes) for probe in _probes(KV_TILE, head_dim, dtype)):
            break
    else:
        raise InvalidRequest("attention cannot be made batch-invariant here", "batch_invariant")
    widths = [
        width
        for width in range(_STEP, KV_TILE, _STEP)
        if all(
            _is_equal_width(probe, columns)
            for columns in (width, KV_TILE + width)
            for probe in _probes(columns, head_dim, dtype)
        )
    ]
    return Invariance((*widths, KV_TILE), multiple)


class _Probe(NamedTuple):
    """Inputs of an attention call: [2, 1, rows or columns, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def attend(self, num_rows: int, num_columns: int, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.q[:, :, :num_rows], self.k[:, :, :num_columns], self.v[:, :, :num_columns]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)


def _probes(num_columns: int, head_dim: int, dtype: torch.dtype) -> Iterator[_Probe]:
    """Inputs whose first `num_columns` columns cancel in the weighted sum; and such whose scores
    cancel, scaled up so that the rounding errors become weights."""
    generator = torch.Generator().manual_seed(num_columns)
    rows, columns = (2, 1, _ROWS, head_dim), (2, 1, 2 * KV_TILE, head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for shape in (rows, columns, columns))
    cancelling_v = v.clone()
    cancelling_v[:, :, :num_columns] = _cancelling(v[:, :, :num_columns], 2, generator)
    cancelling_k = _cancelling(k, 3, generator)
    for probe in (
        _Probe(torch.zeros_like(q), k, cancelling_v, 1.0),
        _Probe(torch.ones_like(q), cancelling_k, v, 2.0**20),
        _Probe(q, k, v, head_dim**-0.5),
    ):
        yield _Probe(probe.q.to(dtype), probe.k.to(dtype), probe.v.to(dtype), probe.scale)


def _cancelling(x: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Numbers of very different sizes, so that a sum must round; the second half along `dim` is the
    first, negated and shuffled."""
    half = x.shape[dim] // 2
    order = torch.randperm(half, generator=generator)
    first = x.narrow(dim, 0, half)
    first = first * torch.empty(first.shape).uniform_(-10, 10, generator=generator).exp2()
    return torch.cat((first, -first.index_select(dim, order)), dim)


def _are_equal_rows(probe: _Probe, sizes: Iterable[int]) -> bool:
    reference = probe.attend(_ROWS, KV_TILE)
    return all(torch.equal(probe.attend(n, KV_TILE), reference[:, :, :n]) for n in sizes)


def _is_equal_width(probe: _Probe, num_columns: int) -> bool:
    """Whether this many columns give the bits of a whole tile whose other columns are masked."""
    whole = -(-num_columns // KV_TILE) * KV_TILE
    mask = torch.zeros(1, whole, dtype=probe.q.dtype)
    mask[:, num_columns:] = float("-inf")
    return torch.equal(probe.attend(_ROWS, whole, mask), probe.attend(_ROWS, num_columns))


def pad_linears(linears: Iterable[Linear], dtype: torch.dtype) -> None:
    """Set the fewest rows that each layer computes with, so that their number does not matter.

    Raises:
        InvalidRequest: a layer cannot be made batch-invariant here.
    """
    known: dict[tuple[int, int], int] = {}
    for linear in linears:
        shape = (linear.out_features, linear.in_features)
        if linear.packed is not None and shape not in known:
            known[shape] = _fewest_rows(linear, linear.packed.min_rows, dtype)
        if linear.packed is None or not known[shape]:
            raise InvalidRequest(
                f"linear layers of {shape[0]}x{shape[1]} cannot be made batch-invariant here",
                "batch_invariant",
            )
        linear.packed.min_rows = known[shape]


def _fewest_rows(linear: Linear, at_least: int, dtype: torch.dtype) -> int:
    """0: no number makes it batch-invariant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_MANY_ROWS, linear.in_features), generator=generator).to(dtype)
    cancelling = -linear(x)  # added in float32, before the sum is rounded
    reference = linear.plus(x, cancelling)
    equal = {n for n in _FEW_ROWS if torch.equal(linear.plus(x[:n], cancelling[:n]), reference[:n])}
    for fewest in (at_least, 4, 8, 16):
        if all(n in equal for n in _FEW_ROWS if n >= fewest):
            return fewest
    return 0
