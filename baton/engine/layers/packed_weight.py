"""Weights in the layout of oneDNN's inner product on CPU, packed once.

A few rows of float32 are multiplied by our own kernel where the library's is slow at it (without
AVX-512: `python -m bench.linear`). It reads the same memory and adds in the same order, so the bits
of a row do not depend on which of the two computed it.

The ops are private to torch; where they are missing, or do not compute what F.linear does, nothing
is packed. Where our kernel is missing, or does not have their bits, they do without.
"""

import ctypes
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.huge_pages import use_huge_pages

try:
    from baton.kernels import _skinny_gemm
except ImportError:
    _skinny_gemm = None  # type: ignore[assignment]

Activation = Literal["none", "swish"]
Operator = Literal["mul", "add"]

_OPS = {"none": 0, "swish": 1, "mul": 2, "add": 3}
_PANEL = 64  # output features side by side in a packed weight
_PADDED_TO = 16  # its input features
_MAX_ROWS = 32  # that our kernel takes
# oneDNN's AVX-512 kernels read weights faster for four rows than for one, two or three.
_FEWEST_ROWS = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1


class PackedWeight(Protocol):
    """Of shape [out_features, in_features]. Fewer than `min_rows` rows are computed as so many."""

    min_rows: int

    def pointwise(self, x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        """activation(x Wᵀ + b); x: [num_rows, in_features]."""
        ...

    def binary(self, x: Tensor, other: Tensor, bias: Tensor | None, op: Operator) -> Tensor:
        """(x Wᵀ + b) op other; other: [num_rows, out_features]."""
        ...


def pack_weight(weight: Tensor) -> PackedWeight | None:
    """None: this build and processor do not compute this shape and dtype packed, or not correctly.

    Args:
        weight: [out_features, in_features], on CPU.
    """
    out_features, in_features = weight.shape
    if not _is_right(out_features, in_features, weight.dtype):
        return None
    if _has_equal_bits(out_features, in_features, weight.dtype):
        skinny = SkinnyProduct(weight)
        if skinny.is_in_panels(weight):
            return skinny
    return InnerProduct(weight)


class InnerProduct:
    """oneDNN's."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._address = torch.ops.mkldnn.data_ptr(self._weight)
        self._num_bytes = torch.ops.mkldnn._nbytes(self._weight)
        use_huge_pages(self._address, self._num_bytes)
        self.min_rows = _FEWEST_ROWS

    def pointwise(self, x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        """See PackedWeight."""
        num_rows = max(len(x), self.min_rows)
        call = torch.ops.mkldnn._linear_pointwise
        y: Tensor = call(_pad(x, num_rows), self._weight, bias, activation, [], None)
        return y[: len(x)]

    def binary(self, x: Tensor, other: Tensor, bias: Tensor | None, op: Operator) -> Tensor:
        """See PackedWeight."""
        num_rows = max(len(x), self.min_rows)
        call = torch.ops.mkldnn._linear_pointwise.binary
        y: Tensor = call(_pad(x, num_rows), _pad(other, num_rows), self._weight, bias, op)
        return y[: len(x)]


class SkinnyProduct(InnerProduct):
    """Few rows by our kernel, which reads oneDNN's weight; their number matters to it no more than
    to oneDNN."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._shape = tuple(weight.shape)
        memory = (ctypes.c_float * (self._num_bytes // 4)).from_address(self._address)
        self._memory: npt.NDArray[np.float32] = np.ctypeslib.as_array(memory)

    def is_in_panels(self, weight: Tensor) -> bool:
        """Whether oneDNN has chosen the layout that our kernel reads: [panels, in_features,
        _PANEL], padded with zeros. Compares the first and the last panel."""
        out_features, in_features = weight.shape
        num_panels, padded = -(-out_features // _PANEL), -(-in_features // _PADDED_TO) * _PADDED_TO
        if len(self._memory) != num_panels * padded * _PANEL:
            return False
        panels = torch.from_numpy(self._memory.reshape(num_panels, padded, _PANEL))
        last = out_features - (num_panels - 1) * _PANEL
        return torch.equal(
            panels[0, :in_features, : min(_PANEL, out_features)], weight[:_PANEL].t()
        ) and torch.equal(panels[-1, :in_features, :last], weight[-last:].t())

    def pointwise(self, x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        """See PackedWeight."""
        if len(x) > _MAX_ROWS:
            return super().pointwise(x, bias, activation)
        return self._multiply(x, bias, None, activation)

    def binary(self, x: Tensor, other: Tensor, bias: Tensor | None, op: Operator) -> Tensor:
        """See PackedWeight."""
        if len(x) > _MAX_ROWS:
            return super().binary(x, other, bias, op)
        return self._multiply(x, bias, other, op)

    def _multiply(
        self, x: Tensor, bias: Tensor | None, other: Tensor | None, op: Activation | Operator
    ) -> Tensor:
        out_features, in_features = self._shape
        y = x.new_empty(len(x), out_features)
        _skinny_gemm.multiply_rows(
            x.contiguous().numpy().data,
            self._memory.data,
            y.numpy().data,
            None if bias is None else bias.numpy().data,
            None if other is None else other.contiguous().numpy().data,
            in_features,
            out_features,
            _OPS[op],
            torch.get_num_threads(),
        )
        return y


def _pad(x: Tensor, num_rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, num_rows - len(x))) if len(x) < num_rows else x


# ── what this build and processor can do ─────────────────────────────────────────────────────────


@lru_cache(maxsize=1024)
def _is_right(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype not in (torch.float32, torch.bfloat16) or not has_mkldnn:
        return False
    mkldnn = torch.ops.mkldnn
    needed = ("_reorder_linear_weight", "_linear_pointwise", "data_ptr", "_nbytes")
    if not all(hasattr(mkldnn, name) for name in needed):
        return False
    if dtype is torch.bfloat16 and not mkldnn._is_mkldnn_bf16_supported():
        return False
    trial = _Trial(out_features, in_features, dtype)
    dense = F.linear(trial.x.double(), trial.weight.double())
    other = trial.other
    wanted = (dense, F.silu(dense), dense * other, dense + other)
    tolerance = (2.0**-6 if dtype is torch.bfloat16 else 2.0**-18) * dense.abs().max().item()
    return all(
        bool((got.double() - want).abs().max() < tolerance * 4)
        for got, want in zip(trial.results(InnerProduct(trial.weight)), wanted, strict=True)
    )


@lru_cache(maxsize=1024)
def _has_equal_bits(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether our kernel has those of the inner product, and is wanted."""
    is_faster = dtype is torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if not is_faster or _skinny_gemm is None:
        return False
    trial = _Trial(out_features, in_features, dtype)
    skinny = SkinnyProduct(trial.weight)
    return skinny.is_in_panels(trial.weight) and all(
        torch.equal(got, want)
        for num_rows in (1, 2, 3, 4, 5, 8, _MAX_ROWS)
        for got, want in zip(
            trial.results(skinny, num_rows),
            trial.results(InnerProduct(trial.weight), num_rows),
            strict=True,
        )
    )


class _Trial:
    """A few output features show whether a kernel is right; the full size only costs time."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        num_features = min(out_features, _PANEL)
        shapes = (
            (num_features, in_features),
            (_MAX_ROWS, in_features),
            (_MAX_ROWS, num_features),
        )
        self.weight, self.x, self.other = (
            torch.randn(shape, generator=generator).to(dtype) for shape in shapes
        )

    def results(self, packed: PackedWeight, num_rows: int = _MAX_ROWS) -> tuple[Tensor, ...]:
        x, other = self.x[:num_rows], self.other[:num_rows]
        return (
            packed.pointwise(x, None, "none"),
            packed.pointwise(x, None, "swish"),
            packed.binary(x, other, None, "mul"),
            packed.binary(x, other, None, "add"),
        )
