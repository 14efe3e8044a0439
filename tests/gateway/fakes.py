"""A backend that plays scripts instead of talking to workers."""

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from baton.errors import BatonError, Cause
from baton.gateway.backend import (
    ClusterView,
    LinkView,
    Moved,
    PairConflict,
    PrefillPath,
    RequestReport,
    ServedModel,
    WorkerState,
    WorkerView,
)
from baton.pooling import PoolingInput, PoolingRequest
from baton.types import (
    FinishReason,
    LegId,
    LinkRate,
    Logprobs,
    Request,
    Role,
    TokenChunk,
    TransferStats,
    WorkerSnapshot,
)
from baton.wire import request_to_pb

Step = TokenChunk | BatonError | asyncio.Event
Script = Callable[[Request], Sequence[Step]]

REPORT = RequestReport(
    path=PrefillPath.REMOTE,
    prefill_worker="p0",
    decode_worker="d0",
    num_cached_tokens=2,
    num_attempts=2,
    queue_ms=0.01,
    prefill_ms=0.02,
    transfers=(TransferStats("grpc", num_bytes=4096, num_tokens=3, duration_ms=1.5),),
)


class FakeStream:
    """Plays its steps: gives chunks, raises errors, waits for events; ends when aborted."""

    def __init__(
        self, request: Request, steps: Sequence[Step], report: RequestReport = REPORT
    ) -> None:
        self.request = request
        self.finished_choices: list[int] = []
        self.aborted = asyncio.Event()
        self.report = report
        self._steps = deque(steps)

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> TokenChunk:
        while self._steps and not self.aborted.is_set():
            step = self._steps[0]
            if isinstance(step, asyncio.Event):
                await self._either(step)
            if self.aborted.is_set():
                break
            self._steps.popleft()
            if isinstance(step, BatonError):
                raise step
            if isinstance(step, TokenChunk) and step.choice not in self.finished_choices:
                return step
        raise StopAsyncIteration

    async def _either(self, event: asyncio.Event) -> None:
        waits = [asyncio.create_task(e.wait()) for e in (event, self.aborted)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def finish_choice(self, choice: int) -> None:
        self.finished_choices.append(choice)

    def abort(self) -> None:
        self.aborted.set()


@dataclass
class FakeBackend:
    """`script` decides what each request gets."""

    script: Script
    served: tuple[ServedModel, ...]
    is_ready: bool = True
    has_redis: bool = True
    refuse: BatonError | None = None
    streams: list[FakeStream] = field(default_factory=list)
    scored: list[Request] = field(default_factory=list)
    pooled: list[PoolingRequest] = field(default_factory=list)
    hold: asyncio.Event | None = None  # pooling waits for it
    num_pooling: int = 0
    report: RequestReport = REPORT  # of every request

    def models(self) -> tuple[ServedModel, ...]:
        return self.served

    def ready(self) -> bool:
        return self.is_ready

    def topology(self) -> ClusterView:
        load = WorkerSnapshot(
            Role.PREFILL,
            num_running=1,
            free_blocks=7,
            total_blocks=9,
            link_rates=(LinkRate("grpc", True, 5e8),),
        )
        worker = WorkerView(
            worker_id="p0",
            role=Role.PREFILL,
            state=WorkerState.UP,
            model=self.served[0].name if self.served else "",
            pid=42,
            address="127.0.0.1:9000",
            host_id="h",
            device="cpu",
            block_size=16,
            snapshot=load,
        )
        other = replace(worker, worker_id="d0", role=Role.DECODE)
        moved, failures = {"grpc": Moved(1, 4096, 0.5)}, {Cause.FRAME_CORRUPT: 2}
        link = LinkView("p0", "d0", "grpc", 1e6, moved, failures, in_flight_bytes=512)
        conflict = PairConflict("p0", "d1", Cause.LAYOUT_INCOMPATIBLE, "head_dim 8 against 16")
        return ClusterView(
            (worker, other), (link,), conflicts=(conflict,), is_redis_reachable=self.has_redis
        )

    async def score(self, request: Request) -> tuple[Logprobs, ...]:
        self.scored.append(request)
        if self.refuse is not None:
            raise self.refuse
        num_top = request.sampling.prompt_logprobs or 0
        return tuple(
            Logprobs(-float(i), 2, tuple((9 + n, -0.5) for n in range(num_top)))
            for i in request.prompt_token_ids[1:]
        )

    async def pool(self, model: str, request: PoolingRequest) -> tuple[bytes, ...]:
        self.pooled.append(request)
        if self.refuse is not None:
            raise self.refuse
        served = next(one for one in self.served if one.name == model)
        assert served.pooling is not None, "a generating model was asked to pool"
        num_values = request.dimensions or served.pooling.num_values
        self.num_pooling += 1
        try:
            if self.hold is not None:
                await self.hold.wait()
        finally:
            self.num_pooling -= 1
        return tuple(
            struct.pack(f"<{num_values}f", *embedding(one, num_values)) for one in request.inputs
        )

    def open(self, request: Request) -> FakeStream:
        if self.refuse is not None:
            raise self.refuse
        request_to_pb(request)  # has a form on the wire
        self.streams.append(FakeStream(request, self.script(request), self.report))
        return self.streams[-1]

    @property
    def request(self) -> Request:
        return self.streams[-1].request


def embedding(one: PoolingInput, num_values: int) -> list[float]:
    """What a `FakeBackend` makes of an input."""
    numbers = [len(one.token_ids), *one.token_ids, *range(num_values)]
    return [number % 7 / 7 + 0.1 * index for index, number in enumerate(numbers[:num_values])]


def chunks(
    request: Request,
    token_ids: Sequence[int],
    *,
    choice: int = 0,
    finish: FinishReason | None = FinishReason.LENGTH,
    stop_token_id: int | None = None,
    per_chunk: int = 1,
) -> list[TokenChunk]:
    """`token_ids` as one choice's chunks; with logprobs where the request asks for them."""
    leg = LegId(request.request_id, 1)
    result = []
    for start in range(0, len(token_ids), per_chunk):
        ids = tuple(token_ids[start : start + per_chunk])
        last = start + per_chunk >= len(token_ids)
        logprobs: tuple[Logprobs, ...] = ()
        if request.sampling.logprobs is not None:
            logprobs = tuple(Logprobs(-0.5, 1, ((i, -0.5), (i + 1, -1.5))) for i in ids)
        result.append(
            TokenChunk(
                leg,
                choice,
                start,
                ids,
                logprobs,
                finish if last else None,
                stop_token_id if last else None,
            )
        )
    return result
