"""A client that knows what it must get: the null model, run directly, is the oracle."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.engine.null_runner import NullModel
from baton.errors import Cause
from baton.gateway.legs import Ended
from baton.gateway.request_machine import RequestMachine
from baton.gateway.workers import Worker
from baton.types import Request, TokenChunk

if TYPE_CHECKING:
    from tests.sim.gateway import SimGateway


@dataclass(slots=True, eq=False)
class Client:
    """Checks every token as it comes, and how it ends."""

    gateway: str
    request: Request
    arrives_ms: float
    abort_after_ms: float | None
    stop_modulo: int | None  # a "stop string": the first token divisible by this
    expected: list[tuple[int, ...]]
    got: list[list[int]] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)
    machine: RequestMachine | None = None
    end: Ended | None = None
    is_aborted: bool = False
    is_lost: bool = False  # its gateway crashed

    @property
    def is_over(self) -> bool:
        return self.end is not None or self.is_lost

    def emitted(self, chunk: TokenChunk) -> bool:
        """True when these tokens bring the stop string of their choice."""
        assert self.end is None, "tokens after the end"
        got, expected = self.got[chunk.choice], self.expected[chunk.choice]
        assert chunk.start == len(got), f"index {chunk.start} after {len(got)} tokens"
        stop = chunk.start + len(chunk.token_ids)
        assert chunk.token_ids == expected[chunk.start : stop], (
            f"choice {chunk.choice} got {chunk.token_ids} at {chunk.start}, "
            f"expected {expected[chunk.start : stop]}"
        )
        is_last = stop == len(expected)
        assert (chunk.finish_reason is not None) == is_last, "finish reason and last token differ"
        got.extend(chunk.token_ids)
        modulo = self.stop_modulo
        if modulo is None or chunk.choice in self.stopped:
            return False
        if any(token_id % modulo == 0 for token_id in chunk.token_ids):
            self.stopped.add(chunk.choice)
            return True
        return False

    def refused(self, cause: Cause, gateway: "SimGateway") -> None:
        self.end = Ended(cause, "refused")
        self._check_unserved(cause, gateway)

    def ended(self, end: Ended, gateway: "SimGateway") -> None:
        assert self.end is None, "ended twice"
        self.end = end
        if end.cause is None:
            for choice, (got, expected) in enumerate(zip(self.got, self.expected, strict=True)):
                complete = len(got) == len(expected) or choice in self.stopped
                assert complete, f"choice {choice} ended after {len(got)} of {len(expected)} tokens"
            return
        self._check_error(end.cause, gateway)

    def _check_error(self, cause: Cause, gateway: "SimGateway") -> None:
        """An error is only right when nobody could have served the request."""
        machine, fleet = self.machine, gateway.fleet
        assert machine is not None
        reason = f"{self.request.request_id} failed with {cause.name}"
        if cause is Cause.CANCELLED:
            assert self.is_aborted, reason
        elif cause is Cause.DEADLINE_EXCEEDED:
            assert gateway.world.now >= machine.deadline_ms, reason
        elif cause is Cause.WORKER_LOST:
            assert fleet.stats.num_breaks >= 2, reason
        else:
            self._check_unserved(cause, gateway)

    def _check_unserved(self, cause: Cause, gateway: "SimGateway") -> None:
        """Nobody could serve it: ever, or now."""
        reason = f"{self.request.request_id} failed with {cause.name}"
        able = [worker for worker in gateway.dispatcher.fleet if self._fits(worker)]
        if cause is Cause.NEVER_FITS:
            assert not able, reason
            assert self.machine is None, f"{reason}, and was accepted"
        else:
            assert cause in {Cause.NO_WORKER, Cause.DRAINING}, reason
            assert not any(worker.accepts for worker in able), reason

    def _fits(self, worker: Worker) -> bool:
        num_prompt, info = len(self.request.prompt_token_ids), worker.info
        longest = num_prompt + (self.request.sampling.max_tokens or 0)
        num_slots = max(min(longest, info.max_model_len) - 1, num_prompt)
        return num_slots <= info.num_blocks * info.layout.block_size


def expected_output(model: NullModel, request: Request, max_len: int) -> list[tuple[int, ...]]:
    sampling = request.sampling
    return [
        model.generate(request.prompt_token_ids, sampling, choice, max_len)
        for choice in range(sampling.n)
    ]
