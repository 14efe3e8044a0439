"""The requests that a pooling worker has, on its event loop: from a call to the engine and back."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.engine.pooling_core import (
    AbortJob,
    AddJob,
    PoolingCommand,
    PoolingOutput,
    PoolingRow,
)
from baton.errors import BatonError, Cause, InvalidRequest
from baton.pooling import PoolingRequest, check_input
from baton.types import Role, WorkerInfo, WorkerSnapshot

MAX_OPEN_INPUTS = 8192  # beyond it a request is refused; another worker may have room


@dataclass(slots=True)
class _Job:
    num_tokens: list[int]  # of each input
    done: asyncio.Future[None]
    results: dict[int, bytes] = field(default_factory=dict)


class PoolingDesk:
    def __init__(self, info: WorkerInfo, post: Callable[[PoolingCommand], None]) -> None:
        """`post`: to the engine; may raise BatonError."""
        assert info.pooling is not None, "a pooling worker's"
        self._info = info
        self._pooling = info.pooling
        self._post = post
        self._numbers = itertools.count()
        self._jobs: dict[int, _Job] = {}
        self.is_draining = False
        self._is_stuck = False
        self.num_inputs = 0  # open
        self.num_tokens = 0  # of these

    def __len__(self) -> int:
        return len(self._jobs)

    async def pool(self, request: PoolingRequest) -> list[bytes]:
        """Results in the order of the inputs. Cancelling it takes them from the engine's queue.

        Raises:
            BatonError: it cannot be served, or failed.
        """
        self._check(request)
        number = next(self._numbers)
        sizes = [len(one.token_ids) for one in request.inputs]
        job = _Job(sizes, asyncio.get_running_loop().create_future())
        rows = tuple(
            PoolingRow(one, request.use_activation, request.dimensions) for one in request.inputs
        )
        self._post(AddJob(number, rows, request.priority))
        self._jobs[number] = job
        self.num_inputs += len(sizes)
        self.num_tokens += sum(sizes)
        try:
            await job.done
        finally:
            self._forget(number, job)
        return [job.results[index] for index in range(len(sizes))]

    def _check(self, request: PoolingRequest) -> None:
        """
        Raises:
            BatonError
        """
        if self.is_draining:
            raise BatonError(Cause.DRAINING, "the worker is shutting down")
        if self._is_stuck:
            raise BatonError(Cause.STEP_FAILED, "the engine does not finish a step")
        if self.num_inputs and self.num_inputs + len(request.inputs) > MAX_OPEN_INPUTS:
            raise BatonError(Cause.OVERLOADED, "too many inputs are waiting for the engine")
        self._pooling.check_dimensions(request.dimensions, self._info.model)
        for one in request.inputs:
            check_input(one, self._info.max_model_len, self._info.vocab_size, "input")
            if one.second_start is not None and not self._pooling.tells_pairs:
                raise InvalidRequest("the model does not tell two texts apart", "input")

    def _forget(self, number: int, job: _Job) -> None:
        del self._jobs[number]
        self.num_inputs -= len(job.num_tokens) - len(job.results)
        self.num_tokens -= sum(
            size for index, size in enumerate(job.num_tokens) if index not in job.results
        )
        if len(job.results) < len(job.num_tokens):
            try:
                self._post(AbortJob(number))
            except BatonError:
                return  # the engine is gone, and everything with it

    def on_output(self, output: PoolingOutput) -> None:
        for result in output.results:
            job = self._jobs.get(result.job)
            if job is None or job.done.done():
                continue
            if isinstance(result.value, Cause):
                detail = f"an input failed: {result.value.name.lower()}"
                job.done.set_exception(BatonError(result.value, detail))
                continue
            job.results[result.index] = result.value
            self.num_inputs -= 1
            self.num_tokens -= job.num_tokens[result.index]
            if len(job.results) == len(job.num_tokens):
                job.done.set_result(None)

    def tell_stuck(self, is_stuck: bool) -> None:
        """Whether the engine finishes no step: then what is open is given up, for others to do."""
        self._is_stuck = is_stuck
        for job in self._jobs.values() if is_stuck else ():
            if not job.done.done():
                detail = "the engine does not finish a step"
                job.done.set_exception(BatonError(Cause.STEP_FAILED, detail))

    def snapshot(self, step_age_ms: float) -> WorkerSnapshot:
        return WorkerSnapshot(
            role=Role.POOLING,
            num_waiting=self.num_inputs,
            queued_prefill_tokens=self.num_tokens,
            step_age_ms=step_age_ms,
            draining=self.is_draining or self._is_stuck,
        )
