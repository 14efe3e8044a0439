"""A pooling engine: jobs in, results out. A step takes whole inputs, of any jobs, up to its bounds;
nothing of them is kept, so there is nothing else to schedule.

Pure and synchronous: no thread, no I/O, no torch, and the clock is passed in.
"""

import heapq
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from baton.errors import Cause
from baton.pooling import PoolingInput
from baton.types import StepTiming

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolingRow:
    """One sequence of a step, and what is wanted of it; see `baton.pooling.PoolingRequest`."""

    input: PoolingInput
    use_activation: bool | None = None
    dimensions: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input.token_ids)


class Runner(Protocol):
    """See `baton.engine.pooling_runner.PoolingRunner`."""

    def run(self, rows: Sequence[PoolingRow]) -> list[bytes | None]: ...


@dataclass(frozen=True, slots=True)
class AddJob:
    job: int
    rows: tuple[PoolingRow, ...]
    priority: int = 0  # lower runs first


@dataclass(frozen=True, slots=True)
class AbortJob:
    """Unknown jobs are ignored: the abort may have crossed the end."""

    job: int


PoolingCommand = AddJob | AbortJob


@dataclass(frozen=True, slots=True)
class PoolingResult:
    job: int
    index: int  # of the row in its job
    value: bytes | Cause  # float32 little-endian, or why there is none


@dataclass(frozen=True, slots=True)
class PoolingOutput:
    """What one step computed."""

    results: tuple[PoolingResult, ...]
    timing: StepTiming


@dataclass(frozen=True, slots=True, order=True)
class _Waiting:
    priority: int
    number: int  # first come, first served
    job: int
    index: int


class PoolingCore:
    def __init__(
        self,
        runner: Runner,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            max_num_batched_tokens: of one step, but for an input that is longer alone.
            clock: seconds that never go back.
        """
        self._runner = runner
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._clock = clock
        self._numbers = count()
        self._waiting: list[_Waiting] = []
        self._jobs: dict[int, tuple[PoolingRow, ...]] = {}
        self._num_left: dict[int, int] = {}  # job → rows without a result

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def apply(self, command: PoolingCommand) -> None:
        """Between steps only."""
        if isinstance(command, AbortJob):
            self._jobs.pop(command.job, None)
            self._num_left.pop(command.job, None)
            return
        self._jobs[command.job] = command.rows
        self._num_left[command.job] = len(command.rows)
        for index in range(len(command.rows)):
            entry = _Waiting(command.priority, next(self._numbers), command.job, index)
            heapq.heappush(self._waiting, entry)

    def step(self) -> PoolingOutput | None:
        """Compute once; None if nothing waits."""
        started = self._clock()
        taken = self._take()
        if not taken:
            return None
        rows = [self._jobs[entry.job][entry.index] for entry in taken]
        results = tuple(
            PoolingResult(entry.job, entry.index, value)
            for entry, value in zip(taken, self._run(rows), strict=True)
        )
        for entry in taken:
            self._num_left[entry.job] -= 1
            if not self._num_left[entry.job]:
                self.apply(AbortJob(entry.job))
        num_tokens = sum(row.num_tokens for row in rows)
        duration_ms = (self._clock() - started) * 1e3
        return PoolingOutput(results, StepTiming(num_tokens, duration_ms=duration_ms))

    def _take(self) -> list[_Waiting]:
        """The next inputs, in order, until one does not fit. The first always does."""
        taken: list[_Waiting] = []
        num_tokens = 0
        while self._waiting and len(taken) < self._max_num_seqs:
            entry = self._waiting[0]
            if entry.job in self._jobs:
                num_tokens += self._jobs[entry.job][entry.index].num_tokens
                if taken and num_tokens > self._max_num_batched_tokens:
                    break
                taken.append(entry)
            heapq.heappop(self._waiting)
        return taken

    def _run(self, rows: Sequence[PoolingRow]) -> list[bytes | Cause]:
        """A step that fails is repeated input by input, so that only the one at fault fails."""
        try:
            results = self._runner.run(rows)
        except Exception:
            log.exception("a step of %d inputs failed", len(rows))
            if len(rows) == 1:
                return [Cause.STEP_FAILED]
            return [value for row in rows for value in self._run([row])]
        return [Cause.NON_FINITE_LOGITS if value is None else value for value in results]
