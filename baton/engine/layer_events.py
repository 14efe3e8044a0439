"""Telling of layers as a CUDA device finishes them.

The engine's thread launches a whole step long before the device has computed it. Behind each
layer's store it records an event; a thread that sleeps on these events, one after the other, tells
of the layers.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from baton.engine.batch import OnLayers
from baton.engine.layers.attention import StepAttention


class Event(Protocol):
    """What is asked of `torch.cuda.Event`."""

    def record(self) -> object: ...

    def synchronize(self) -> object: ...


def blocking_event() -> Event:
    """One whose waiter sleeps instead of spinning."""
    event: Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    return event


class LayerEvents:
    """For one runner, one step at a time: `announcing`, then `finish`."""

    def __init__(
        self,
        num_layers: int,
        *,
        pin_memory: bool = True,
        make_event: Callable[[], Event] = blocking_event,
    ) -> None:
        self._events = [make_event() for _ in range(num_layers)]
        # Of each layer's new keys and values; not finite when one of them is not.
        self._sums = torch.zeros(num_layers, dtype=torch.float32, pin_memory=pin_memory)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-layers")
        self._waiting: list[Future[None]] = []
        self._is_finite = True

    def announcing(self, attention: StepAttention, on_layers: OnLayers) -> StepAttention:
        """The same attention. `on_layers` is called on another thread, for the layers up to the
        first whose keys or values are not finite."""
        self._is_finite = True

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen = attention(layer, q, k, v)
            total = k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)
            self._sums[layer].copy_(total, non_blocking=True)
            self._events[layer].record()
            self._waiting.append(self._thread.submit(self._tell, layer, on_layers))
            return seen

        return attend

    def _tell(self, layer: int, on_layers: OnLayers) -> None:
        self._events[layer].synchronize()
        self._is_finite = self._is_finite and math.isfinite(self._sums[layer].item())
        if self._is_finite:
            on_layers(layer + 1)

    def finish(self) -> None:
        """Returns when nobody is told of this step any more; also after a step that failed."""
        waiting, self._waiting = self._waiting, []
        for told in waiting:
            told.result()

    def close(self) -> None:
        """Idempotent."""
        self._thread.shutdown(wait=True)
