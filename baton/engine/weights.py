"""Tensors by name: from safetensors files, or random ones of the right shape."""

import hashlib
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from baton.errors import InvalidRequest

log = logging.getLogger(__name__)


class SafetensorsWeights:
    """Reads tensors one at a time; a context manager that shows progress and tells the total.

    On CPU a tensor whose dtype needs no conversion is a private mapping of the file: only what is
    touched is read, and what is held costs page cache, not memory. The files must not be modified
    while the model lives.
    """

    def __init__(
        self,
        files: list[Path],
        dtype: torch.dtype,
        device: torch.device,
        *,
        show_progress: bool = True,
    ) -> None:
        """Raises:
        InvalidRequest: a file is truncated or no safetensors file.
        """
        self._dtype = dtype
        self._device = device
        self._files: dict[str, Path] = {}  # tensor name → file
        for file in files:
            with _open(file) as content:
                self._files.update(dict.fromkeys(content.keys(), file))
        self._num_bytes = 0
        self._started = time.monotonic()
        total = sum(file.stat().st_size for file in files)
        self._bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc="Loading weights",
            disable=not show_progress,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._bar.total = self._num_bytes  # headers, and tensors that nobody took, are none
            self._bar.refresh()
        self._bar.close()
        if error is None:
            seconds = time.monotonic() - self._started
            log.info("loaded in %.1f s, %.2f GiB", seconds, self._num_bytes / 2**30)

    def has(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, *shape: int) -> Tensor:
        """See `WeightSource`."""
        file = self._files.get(name)
        if file is None:
            raise InvalidRequest(f"the checkpoint has no tensor {name}", "model")
        with _open(file) as content:
            tensor: Tensor = content.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise InvalidRequest(
                f"{name} in {file.name} has shape {list(tensor.shape)}, not {list(shape)}", "model"
            )
        if not tensor.is_floating_point():
            raise InvalidRequest(f"{name} in {file.name} is {tensor.dtype}, not a float", "model")
        num_bytes = tensor.numel() * tensor.element_size()
        self._num_bytes += num_bytes
        self._bar.update(num_bytes)
        return tensor.to(device=self._device, dtype=self._dtype)


def _open(file: Path) -> safe_open:
    # Opened anew for every tensor: a tensor keeps its whole mapping alive, and with one mapping for
    # all of them the pages of every other tensor would stay resident.
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InvalidRequest(f"{file} is damaged or incomplete: {error}", "model") from error


class DummyWeights:
    """Random weights, for benchmarks without files: norms are 1, the rest N(0, 0.02²), each tensor
    a function of (seed, name)."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._dtype = dtype
        self._device = device
        self._seed = seed

    def has(self, name: str) -> bool:
        return True

    def take(self, name: str, *shape: int) -> Tensor:
        """See `WeightSource`."""
        if "norm" in name.lower():
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7], "little"))
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.normal_(0.0, 0.02, generator=generator)
