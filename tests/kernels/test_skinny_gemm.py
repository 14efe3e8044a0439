"""skinny_gemm.c: right, whatever the shape; a row's bits depend on nothing else; bad buffers."""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

gemm = pytest.importorskip(
    "baton.kernels._skinny_gemm", reason="not built, or not for this machine", exc_type=ImportError
)

OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda y, other: y,
    "swish": lambda y, other: F.silu(y),
    "mul": torch.mul,
    "add": torch.add,
}


def in_panels(weight: Tensor) -> Tensor:
    """[out_features, in_features] → [panels, in_features, 64], padded with NaN, which is not read
    or does not show."""
    out_features, in_features = weight.shape
    padding = (0, -in_features % 16, 0, -out_features % 64)
    padded = F.pad(weight, padding, value=float("nan"))
    return padded.view(-1, 64, padded.shape[1]).transpose(1, 2).contiguous()


def multiply(
    x: Tensor, weight: Tensor, op: str, other: Tensor, bias: Tensor | None, num_threads: int = 1
) -> Tensor:
    y = torch.full((len(x), len(weight)), float("nan"))
    is_binary = op in ("mul", "add")
    gemm.multiply_rows(
        x.numpy(),
        in_panels(weight).numpy(),
        y.numpy(),
        None if bias is None else bias.numpy(),
        other[: len(x)].numpy() if is_binary else None,
        weight.shape[1],
        weight.shape[0],
        list(OPS).index(op),
        num_threads,
    )
    return y


@settings(max_examples=60, deadline=None)
@given(
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 1200) | st.sampled_from([1024, 2048, 2100]),
    num_rows=st.integers(1, 32),
    op=st.sampled_from(list(OPS)),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products(
    out_features: int, in_features: int, num_rows: int, op: str, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator)
    weight, x = randn(out_features, in_features), randn(num_rows, in_features)
    other, bias = randn(num_rows, out_features), randn(out_features) if has_bias else None
    got = multiply(x, weight, op, other, bias)
    wide_bias = None if bias is None else bias.double()
    expected = OPS[op](F.linear(x.double(), weight.double(), wide_bias), other.double())
    torch.testing.assert_close(
        got.double(), expected, rtol=1e-5, atol=3e-6 * in_features**0.5 + 1e-6
    )
    for num_threads in (2, 3):
        assert torch.equal(multiply(x, weight, op, other, bias, num_threads), got)
    for few in {1, num_rows // 2 + 1}:
        assert torch.equal(multiply(x[:few], weight, op, other, bias), got[:few])
    assert torch.equal(multiply(x[-1:], weight, op, other[-1:], bias), got[-1:])


def test_swish_of_extremes() -> None:
    values = torch.tensor([0.0, -0.0, 88.0, -88.0, 200.0, -200.0, 3e38, -3e38, 1e-40, -1e-40])
    got = multiply(values[:, None], torch.ones(1, 1), "swish", torch.empty(0), None)[:, 0]
    torch.testing.assert_close(got.double(), F.silu(values.double()), rtol=1e-6, atol=1e-35)


Floats = npt.NDArray[np.float32]


def buffers(**changes: object) -> dict[str, object]:
    """Arguments for 3 rows of 20 features to 70."""
    zeros = partial(np.zeros, dtype=np.float32)
    arguments: dict[str, object] = {
        "x": zeros((3, 20)),
        "weight": torch.zeros(2, 32, 64).numpy(),
        "out": zeros((3, 70)),
        "bias": None,
        "other": None,
        "in_features": 20,
        "out_features": 70,
        "op": 0,
        "num_threads": 1,
    }
    return arguments | changes


def read_only() -> Floats:
    array = np.zeros((3, 70), np.float32)
    array.flags.writeable = False
    return array


WRONG: dict[str, dict[str, object]] = {
    "a part of a row": {"x": np.zeros(61, np.float32)},
    "no rows": {"x": np.zeros((0, 20), np.float32), "out": np.zeros((0, 70), np.float32)},
    "too many rows": {"x": np.zeros((33, 20), np.float32), "out": np.zeros((33, 70), np.float32)},
    "a small weight": {"weight": torch.zeros(1, 32, 64).numpy()},
    "a weight without padding": {"weight": torch.zeros(2, 20, 64).numpy()},
    "a weight out of line": {"weight": torch.zeros(2 * 32 * 64 + 1).numpy()[1:]},
    "a small result": {"out": np.zeros((2, 70), np.float32)},
    "a small bias": {"bias": np.zeros(69, np.float32)},
    "a factor that is missing": {"op": 2},
    "a factor too many": {"other": np.zeros((3, 70), np.float32)},
    "a small factor": {"op": 2, "other": np.zeros((2, 70), np.float32)},
    "an op that is none": {"op": 4},
    "a negative op": {"op": -1},
    "no features": {"in_features": 0},
    "negative features": {"out_features": -70},
    "no threads": {"num_threads": 0},
}


def test_the_arguments_of_the_refusals_are_right_but_for_one() -> None:
    gemm.multiply_rows(*buffers().values())


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_refusals(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        gemm.multiply_rows(*buffers(**changes).values())


def test_what_is_read_only_is_not_written() -> None:
    with pytest.raises((BufferError, TypeError, ValueError)):
        gemm.multiply_rows(*buffers(out=read_only()).values())
