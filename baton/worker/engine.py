"""The engine of a worker process: built from settings, and watched."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from baton.config import WorkerConfig
from baton.engine.batch import Batch, OnLayers, Runner, Sampled
from baton.failpoints import Failpoints
from baton.latency import LatencyModel
from baton.types import StepTiming

LOOK_S = 0.5
MIN_STUCK_S = 10.0
STUCK_FACTOR = 5.0  # × the prediction for the largest step


class FailingRunner:
    """A `Runner` with a failpoint in front of every step."""

    def __init__(self, runner: Runner, failpoints: Failpoints) -> None:
        self._runner = runner
        self._failpoints = failpoints

    def run(
        self, batch: Batch, on_layers: OnLayers | None = None
    ) -> dict[int, tuple[Sampled, ...]]:
        self._failpoints.hit("engine-step")
        return self._runner.run(batch, on_layers)


class Watched(Protocol):
    """An engine's thread."""

    @property
    def step_started_at(self) -> float | None: ...

    @property
    def is_alive(self) -> bool: ...


class StepWatch:
    """Is the engine making progress? Liveness (heartbeats) is something else: a worker that answers
    but whose step never ends goes red."""

    def __init__(
        self,
        engine: Watched,
        latency: LatencyModel,
        config: WorkerConfig,
        longest_input: int = 0,
    ) -> None:
        """
        Args:
            longest_input: tokens that are never cut into chunks.
        """
        self._engine = engine
        self._latency = latency
        self._largest = StepTiming(
            num_prefill_tokens=max(config.max_num_batched_tokens, longest_input),
            num_decodes=config.max_num_seqs,
            context_tokens=config.max_num_seqs * (config.max_model_len or 4096),
        )

    @property
    def is_well(self) -> bool:
        if not self._engine.is_alive:
            return False
        started_at = self._engine.step_started_at
        return started_at is None or time.monotonic() - started_at <= self.limit_s

    @property
    def limit_s(self) -> float:
        """How long a step may take."""
        return max(MIN_STUCK_S, STUCK_FACTOR * self._latency.step_ms(self._largest) / 1e3)

    async def run(self, set_serving: Callable[[bool], Awaitable[None]]) -> None:
        """Tell whenever the answer changes, beginning with the first; until cancelled."""
        told: bool | None = None
        while True:
            if self.is_well != told:
                told = self.is_well
                await set_serving(told)
            await asyncio.sleep(LOOK_S)
