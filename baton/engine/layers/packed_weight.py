"""Weights in the layouts of oneDNN's CPU kernels, packed once.

Two of its primitives compute x Wᵀ: the inner product, and a convolution of one by one pixels whose
image is the rows. Without AVX-512 the latter takes four to sixteen rows 1.2-1.3× as fast, and one
row or many no slower (`python -m bench.linear`). Its layout depends on the size of the
image and on the number of threads, though, and a weight in another one would be reordered in every
call: so rows are padded to, or divided into, images of sizes that share one layout. Where there are
none, or sums are taken in another order (of more than 1024 features), it is the inner product: the
bits of a result must not depend on how many threads a worker has.

The ops are private to torch; where they are missing, or do not compute what F.linear does, nothing
is packed.
"""

from functools import lru_cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.huge_pages import use_huge_pages

Activation = Literal["none", "swish"]
Operator = Literal["mul", "add"]

_IMAGES = (4, 8, 16, 32)  # rows of an image, all of which must share a layout
_LARGE_IMAGE = 64  # a little faster still, where it shares it too
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
    if _is_faster_as_convolution(out_features, in_features, weight.dtype):
        images = _images(out_features, in_features, torch.get_num_threads())
        if images:
            return Convolution(weight, images)
    return InnerProduct(weight)


class InnerProduct:
    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        _back_by_huge_pages(self._weight)
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


class Convolution:
    def __init__(self, weight: Tensor, images: tuple[int, ...]) -> None:
        """
        Args:
            images: increasing sizes whose kernels expect one layout.
        """
        self._weight = _reorder_for_image(weight, images[0])
        _back_by_huge_pages(self._weight)
        self._images = images
        self.min_rows = images[0]

    def pointwise(self, x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        """See PackedWeight."""
        call = torch.ops.mkldnn._convolution_pointwise
        results = []
        for start, stop, image in self._divide(len(x)):
            rows = _as_images(x[start:stop], image)
            y = call(rows, self._weight, bias, *_ONE_BY_ONE, activation, [], None)
            results.append(_as_rows(y)[: stop - start])
        return results[0] if len(results) == 1 else torch.cat(results)

    def binary(self, x: Tensor, other: Tensor, bias: Tensor | None, op: Operator) -> Tensor:
        """See PackedWeight."""
        call = torch.ops.mkldnn._convolution_pointwise.binary
        results = []
        for start, stop, image in self._divide(len(x)):
            rows, others = (_as_images(t[start:stop], image) for t in (x, other))
            y = call(rows, others, self._weight, bias, *_ONE_BY_ONE, op, None, None, [], None)
            results.append(_as_rows(y)[: stop - start])
        return results[0] if len(results) == 1 else torch.cat(results)

    def _divide(self, num_rows: int) -> list[tuple[int, int, int]]:
        """(start, stop, rows of an image): as many of the largest as there are, and the rest."""
        largest = self._images[-1]
        whole = num_rows // largest * largest
        parts = [(0, whole, largest)] if whole else []
        if whole < num_rows:
            fewest = max(num_rows - whole, self.min_rows)
            parts.append((whole, num_rows, next(i for i in self._images if i >= fewest)))
        return parts


_ONE_BY_ONE = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


def _pad(x: Tensor, num_rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, num_rows - len(x))) if len(x) < num_rows else x


def _as_images(x: Tensor, image: int) -> Tensor:
    """[num_rows, features] → [images, features, image, 1], features innermost as before."""
    x = _pad(x, -(-len(x) // image) * image).contiguous()
    num_features = x.shape[1]
    shape = (len(x) // image, num_features, image, 1)
    return x.as_strided(shape, (image * num_features, 1, num_features, num_features))


def _as_rows(y: Tensor) -> Tensor:
    """The inverse of `_as_images`."""
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


def _back_by_huge_pages(packed: Tensor) -> None:
    use_huge_pages(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))


def _reorder_for_image(weight: Tensor, image: int) -> Tensor:
    kernel = weight.contiguous()[:, :, None, None]
    shape = [1, weight.shape[1], image, 1]
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(kernel, *_ONE_BY_ONE, shape)
    return packed


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
    wanted = (dense, F.silu(dense), dense * trial.other, dense + trial.other)
    tolerance = (2.0**-6 if dtype is torch.bfloat16 else 2.0**-18) * dense.abs().max().item()
    return all(
        bool((got.double() - want).abs().max() < tolerance * 4)
        for got, want in zip(trial.results(InnerProduct(trial.weight)), wanted, strict=True)
    )


@lru_cache(maxsize=1024)
def _is_faster_as_convolution(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """And has the same bits."""
    mkldnn = torch.ops.mkldnn
    needed = ("_reorder_convolution_weight", "_convolution_pointwise", "_get_mkldnn_serialized_md")
    is_faster = dtype is torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if not is_faster or not all(hasattr(mkldnn, name) for name in needed):
        return False
    trial = _Trial(out_features, in_features, dtype)
    wanted = trial.results(InnerProduct(trial.weight))
    got = trial.results(Convolution(trial.weight, _IMAGES))
    return all(map(torch.equal, got, wanted))


class _Trial:
    """A few output features show whether a kernel is right; the full size only costs time."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        num_features = min(out_features, 64)
        shapes = ((num_features, in_features), (3, in_features), (3, num_features))
        self.weight, self.x, self.other = (
            torch.randn(shape, generator=generator).to(dtype) for shape in shapes
        )

    def results(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        return (
            packed.pointwise(self.x, None, "none"),
            packed.pointwise(self.x, None, "swish"),
            packed.binary(self.x, self.other, None, "mul"),
            packed.binary(self.x, self.other, None, "add"),
        )


@lru_cache(maxsize=1024)
def _images(out_features: int, in_features: int, num_threads: int) -> tuple[int, ...]:
    """Sizes of images that share a layout, if enough do. `num_threads` are those of the process:
    the layouts depend on them."""
    weight = torch.empty(out_features, in_features)  # nothing counts but its layout

    def layout(image: int) -> Tensor:
        packed = _reorder_for_image(weight, image)
        described: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
        return described

    first = layout(_IMAGES[0])
    if not all(torch.equal(layout(image), first) for image in _IMAGES[1:]):
        return ()
    return (*_IMAGES, _LARGE_IMAGE) if torch.equal(layout(_LARGE_IMAGE), first) else _IMAGES
