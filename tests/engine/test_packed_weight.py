"""Packed weights: our kernel and oneDNN's have the same bits, and one stands in for the other."""

from collections.abc import Iterator

import pytest
import torch

from baton.engine.layers import packed_weight
from baton.engine.layers.packed_weight import InnerProduct, SkinnyProduct, pack_weight

SHAPES = [(896, 896), (250, 33), (48, 4864), (15, 1), (200, 1025)]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(200, 96)


@pytest.fixture(autouse=True)
def forget_trials() -> Iterator[None]:
    packed_weight._has_equal_bits.cache_clear()
    yield
    packed_weight._has_equal_bits.cache_clear()


needs_ours = pytest.mark.skipif(
    packed_weight._skinny_gemm is None
    or torch.backends.cpu.get_cpu_capability() != "AVX2"
    or not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="skinny_gemm.c was not built, or is not for this processor",
)


@needs_ours
@pytest.mark.parametrize("shape", SHAPES)
def test_our_kernel_has_the_bits_of_onednn(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    ours, theirs = SkinnyProduct(weight), InnerProduct(weight)
    assert isinstance(pack_weight(weight), SkinnyProduct)
    x, other, bias = torch.randn(70, shape[1]), torch.randn(70, shape[0]), torch.randn(shape[0])
    for op in ("none", "swish"):
        whole = theirs.pointwise(x * 4, bias, op)
        for n in (1, 2, 5, 8, 16, 31, 32, 33, 70):
            assert torch.equal(ours.pointwise(x[:n] * 4, bias, op), whole[:n]), (op, n)
    for binary in ("mul", "add"):
        whole = theirs.binary(x, other, bias, binary)
        for n in (1, 3, 8, 32, 33):
            assert torch.equal(ours.binary(x[:n], other[:n], bias, binary), whole[:n]), (binary, n)


@needs_ours
def test_strided_rows(weight: torch.Tensor) -> None:
    packed, x, other = pack_weight(weight), torch.randn(5, 192)[:, ::2], torch.randn(200, 5).t()
    assert packed is not None
    assert torch.equal(packed.pointwise(x, None, "none"), packed.pointwise(x + 0, None, "none"))
    expected = packed.binary(x + 0, other + 0, None, "mul")
    assert torch.equal(packed.binary(x, other, None, "mul"), expected)


def test_without_our_kernel(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    x, usual = torch.randn(3, 96), pack_weight(weight)
    assert usual is not None
    expected = usual.pointwise(x, None, "swish")
    monkeypatch.setattr(packed_weight, "_skinny_gemm", None)
    packed_weight._has_equal_bits.cache_clear()
    packed = pack_weight(weight)
    assert type(packed) is InnerProduct
    assert torch.equal(packed.pointwise(x, None, "swish"), expected)


@needs_ours
def test_a_kernel_with_other_bits_is_not_used(
    weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SkinnyProduct._multiply

    def almost(*args: object) -> torch.Tensor:
        y = right(*args)  # type: ignore[arg-type]
        y[-1, -1] = torch.nextafter(y[-1, -1], torch.tensor(torch.inf))
        return y

    monkeypatch.setattr(SkinnyProduct, "_multiply", almost)
    packed_weight._has_equal_bits.cache_clear()
    assert type(pack_weight(weight)) is InnerProduct


@needs_ours
def test_a_layout_is_recognised_by_what_is_in_it(weight: torch.Tensor) -> None:
    skinny = SkinnyProduct(weight)
    assert skinny.is_in_panels(weight)
    for changed in (0, 199):
        other = weight.clone()
        other[changed, 95] += 1
        assert not skinny.is_in_panels(other)
    assert not skinny.is_in_panels(torch.randn(300, 96))
    assert not skinny.is_in_panels(weight.flip(1))
