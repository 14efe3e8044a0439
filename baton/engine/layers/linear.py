"""y = x Wᵀ + b, with what follows it in a decoder fused in.

On CPU the weight is reordered once for oneDNN (measured 1.4-1.8× of F.linear in decode). The packed
weight replaces the dense one. The ops are private to torch; where they are missing, or do not
compute what F.linear does, the dense weight stays.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.huge_pages import use_huge_pages
from baton.kernels.silu_mul import silu_mul

# oneDNN's AVX-512 kernels read weights faster for four rows than for one, two or three; its AVX2
# kernels do not (measured 16.5 against 22.8 GB/s for one row).
_FEWEST_ROWS = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1


class Linear:
    """x: [num_tokens, in_features] → [num_tokens, out_features], both of the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight`: [out_features, in_features]. The caller drops it: it may be packed here."""
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.is_packed = weight.device.type == "cpu" and _can_pack(*weight.shape, weight.dtype)
        self.weight = _reorder(weight) if self.is_packed else weight.contiguous()
        self.min_rows = _FEWEST_ROWS  # packed: fewer are padded; see baton.engine.invariance

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return self._packed(x, "none")
        return F.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu(x Wᵀ + b)."""
        if self.is_packed:
            return self._packed(x, "swish")
        return F.silu(F.linear(x, self.weight, self.bias), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x Wᵀ + b) * other."""
        if self.is_packed:
            return self._packed_binary(x, other, "mul")
        return F.linear(x, self.weight, self.bias).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x Wᵀ + b) + other; on CUDA `other` is overwritten with it."""
        if self.is_packed:
            return self._packed_binary(x, other, "add")
        if x.is_cuda and self.bias is None:
            return other.addmm_(x, self.weight.t())  # addmm would copy `other` first
        if self.bias is None:
            return torch.addmm(other, x, self.weight.t())
        return F.linear(x, self.weight, self.bias).add_(other)

    def _packed(self, x: Tensor, activation: str) -> Tensor:
        missing = self.min_rows - x.shape[0]
        padded = F.pad(x, (0, 0, 0, missing)) if missing > 0 else x
        y = _linear_pointwise(padded, self.weight, self.bias, activation)
        return y[: x.shape[0]] if missing > 0 else y

    def _packed_binary(self, x: Tensor, other: Tensor, op: str) -> Tensor:
        missing = self.min_rows - x.shape[0]
        if missing <= 0:
            return _linear_binary(x, other, self.weight, self.bias, op)
        x_padded, other_padded = (F.pad(t, (0, 0, 0, missing)) for t in (x, other))
        return _linear_binary(x_padded, other_padded, self.weight, self.bias, op)[: x.shape[0]]


class GatedLinear:
    """silu(gate(x)) * up(x).

    Merged, it is one product and one pass over its result; apart, silu and product ride on the two
    products, where oneDNN can fuse them.
    """

    def __init__(self, gate: Linear, up: Linear, *, is_merged: bool) -> None:
        """Drops both where they are merged: the caller does not keep them."""
        self.is_merged = is_merged
        self.linears: tuple[Linear, ...] = (gate, up)
        if is_merged:
            bias = None
            if gate.bias is not None and up.bias is not None:
                bias = torch.cat((gate.bias, up.bias))
            self.linears = (Linear(torch.cat((gate.weight, up.weight)), bias),)

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, in_features] → [num_tokens, out_features]."""
        if self.is_merged:
            return silu_mul(self.linears[0](x))
        gate, up = self.linears
        return up.times(x, gate.silu(x))


def _reorder(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    use_huge_pages(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
    return packed


def _linear_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], None)
    return y


def _linear_binary(
    x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, op: str
) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, op)
    return y


@lru_cache(maxsize=1024)
def _can_pack(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether this build and processor compute this shape packed, and correctly."""
    has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype not in (torch.float32, torch.bfloat16) or not has_mkldnn:
        return False
    mkldnn = torch.ops.mkldnn
    needed = ("_reorder_linear_weight", "_linear_pointwise", "data_ptr", "_nbytes")
    if not all(hasattr(mkldnn, name) for name in needed):
        return False
    if dtype is torch.bfloat16 and not mkldnn._is_mkldnn_bf16_supported():
        return False
    # A few output features show whether the kernel is right; the full size only costs time.
    generator = torch.Generator().manual_seed(0)
    weight, x, other = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((min(out_features, 64), in_features), (3, in_features), (3, 64))
    )
    other = other[:, : weight.shape[0]].contiguous()
    packed, dense = _reorder(weight), F.linear(x.double(), weight.double())
    results = (
        (_linear_pointwise(x, packed, None, "none"), dense),
        (_linear_pointwise(x, packed, None, "swish"), F.silu(dense)),
        (_linear_binary(x, other, packed, None, "mul"), dense * other),
        (_linear_binary(x, other, packed, None, "add"), dense + other),
    )
    tolerance = (2.0**-6 if dtype is torch.bfloat16 else 2.0**-18) * dense.abs().max().item()
    return all(bool((got.double() - want).abs().max() < tolerance * 4) for got, want in results)
