"""y = x Wᵀ + b, with what follows it in a decoder fused in.

On CPU the weight is packed once for oneDNN (measured 1.4-1.8× of F.linear in decode). The packed
weight replaces the dense one; where it cannot be packed, the dense weight stays.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.layers.packed_weight import pack_weight
from baton.kernels.silu_mul import silu_mul


class Linear:
    """x: [num_tokens, in_features] → [num_tokens, out_features], both of the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight`: [out_features, in_features]. The caller drops it: it may be packed here."""
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = pack_weight(weight) if weight.device.type == "cpu" else None
        self._weight = weight.contiguous() if self.packed is None else None

    @property
    def weight(self) -> Tensor:
        """Of a layer that is not packed."""
        assert self._weight is not None, "packed"
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.pointwise(x, self.bias, "none")
        return F.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu(x Wᵀ + b)."""
        if self.packed is not None:
            return self.packed.pointwise(x, self.bias, "swish")
        return F.silu(F.linear(x, self.weight, self.bias), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x Wᵀ + b) * other."""
        if self.packed is not None:
            return self.packed.binary(x, other, self.bias, "mul")
        return F.linear(x, self.weight, self.bias).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x Wᵀ + b) + other; on CUDA `other` is overwritten with it."""
        if self.packed is not None:
            return self.packed.binary(x, other, self.bias, "add")
        if x.is_cuda and self.bias is None:
            return other.addmm_(x, self.weight.t())  # addmm would copy `other` first
        if self.bias is None:
            return torch.addmm(other, x, self.weight.t())
        return F.linear(x, self.weight, self.bias).add_(other)


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
