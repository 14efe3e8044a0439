"""What "auto" means on which machine."""

import dataclasses

import pytest
import torch

from baton.engine import device
from baton.engine.model_config import parse_model_config
from tests.engine.test_model_config import BASE

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "stored", "native", "where", "expected"),
    [
        ("auto", "bfloat16", True, CPU, torch.bfloat16),
        ("auto", "bfloat16", False, CPU, torch.float32),
        ("auto", "float16", False, CPU, torch.float32),
        ("auto", "float32", False, CPU, torch.float32),
        ("auto", None, True, CPU, torch.float32),
        ("auto", "bfloat16", False, torch.device("cuda", 0), torch.bfloat16),
        ("bfloat16", "float32", False, CPU, torch.bfloat16),
    ],
)
def test_dtype(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stored: str | None,
    native: bool,
    where: torch.device,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(device, "multiplies", lambda dtype: dtype is torch.float32 or native)
    config = dataclasses.replace(parse_model_config(BASE), dtype=stored)
    assert device.select_dtype(name, config.dtype, where) is expected
