"""Hand-overs one at a time, with the bench in the gateway's place."""

import asyncio
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TypeVar

from baton.config import ServeConfig
from baton.gateway.discovery import Discovery
from baton.gateway.sessions import SessionConfig, WorkerSession
from baton.locality import PrefixIndex
from baton.messages import (
    Admitted,
    Bind,
    Failed,
    GatewayMessage,
    Imported,
    KvFailed,
    LegMessage,
    NoRoom,
    Release,
    StepBatch,
    Submit,
)
from baton.rpc import ClusterToken
from baton.types import (
    KVTicket,
    LegId,
    Request,
    SamplingParams,
    StepTiming,
    TokenChunk,
    TransferStats,
    WorkerInfo,
)
from bench.small_fleet import VOCAB

NUM_OUTPUTS = 4
PATIENCE_S = 60.0

T = TypeVar("T", bound=LegMessage)


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    message: LegMessage
    timing: StepTiming | None  # of the step that it came from


class WireGateway:
    """As much of a gateway as it takes: sessions to the workers, and when each message came."""

    def __init__(self, redis_url: str) -> None:
        self._inbox: dict[LegId, asyncio.Queue[Arrival]] = defaultdict(asyncio.Queue)
        self._sessions: dict[str, WorkerSession] = {}
        self._num_legs = 0
        self._discovery = Discovery(
            redis_url,
            ServeConfig().cluster,
            (),
            PrefixIndex(),
            on_join=self._on_join,
            on_leave=lambda _: None,
            inventory=_no_inventory,
        )
        self._running = asyncio.create_task(self._discovery.run())

    async def connect(self, *worker_ids: str) -> None:
        """Returns when there is a session to each of them.

        Raises:
            TimeoutError: after a minute.
        """
        async with asyncio.timeout(PATIENCE_S):
            while not all(map(self._is_up, worker_ids)):  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    def _is_up(self, worker_id: str) -> bool:
        session = self._sessions.get(worker_id)
        return session is not None and session.is_up

    def _on_join(self, info: WorkerInfo) -> None:
        self._sessions[info.worker_id] = WorkerSession(info, ClusterToken(), self, SessionConfig())

    def session_up(self, info: WorkerInfo) -> None: ...

    def session_lost(self, worker_id: str, reason: str) -> None: ...

    def session_batch(self, worker_id: str, batch: StepBatch) -> None:
        now = time.perf_counter()
        for message in batch.messages:
            self._inbox[message.leg].put_nowait(Arrival(now, message, batch.timing))

    def new_leg(self) -> LegId:
        self._num_legs += 1
        return LegId(f"bench{self._num_legs}", 1)

    def info(self, worker_id: str) -> WorkerInfo:
        return self._sessions[worker_id].info

    def send(self, worker_id: str, message: GatewayMessage) -> None:
        self._sessions[worker_id].send(message)

    async def take(self, leg: LegId) -> "Arrival":
        """The leg's next message.

        Raises:
            RuntimeError: the worker refused or failed it.
            TimeoutError: after a minute.
        """
        async with asyncio.timeout(PATIENCE_S):
            arrival = await self._inbox[leg].get()
        if isinstance(arrival.message, Failed | KvFailed | NoRoom):
            raise RuntimeError(f"{arrival.message}")
        return arrival

    async def expect(self, leg: LegId, kind: type[T]) -> tuple[float, T]:
        """The next one of this kind; others before it are skipped.

        Raises:
            RuntimeError, TimeoutError: as `take`.
        """
        while True:
            arrival = await self.take(leg)
            if isinstance(arrival.message, kind):
                return arrival.at, arrival.message

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])
        for session in self._sessions.values():
            await session.close()


async def _no_inventory(_: WorkerInfo) -> tuple[int, list[object]]:
    return 0, []


@dataclass(frozen=True, slots=True)
class HandOver:
    """Milliseconds of one of them."""

    between: float  # first token from P, or Bind if that is later, to second token from D
    step: float  # the one that computed the second token, as D's engine timed it


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one prompt showed; milliseconds."""

    prefill: float  # Admitted to first token
    early: HandOver
    late: HandOver
    bare: float  # the late fetch by itself
    num_bytes: int


class _Decode:
    """One leg on D."""

    def __init__(self, gateway: WireGateway, leg: LegId) -> None:
        self._gateway = gateway
        self._leg = leg
        self.stats = TransferStats("")

    async def run(self, began_at: float) -> HandOver:
        """To its last token."""
        tokens: list[Arrival] = []
        while len(tokens) < NUM_OUTPUTS:
            arrival = await self._gateway.take(self._leg)
            if isinstance(arrival.message, Imported):
                self.stats = arrival.message.stats
            tokens += [arrival] * isinstance(arrival.message, TokenChunk)
        second = tokens[1]
        assert second.timing is not None, "a step computed it"
        return HandOver((second.at - began_at) * 1e3, second.timing.duration_ms)


async def hand_over(gateway: WireGateway, length: int, over: str) -> Prompt:
    """A prompt of random tokens, handed over twice over one transport: bound when P has admitted
    it, and bound again when all its KV is there (a second reader of the same lease)."""
    prompt = tuple(random.randrange(10, VOCAB) for _ in range(length))
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    producer, on_p = gateway.info("prefill-0"), gateway.new_leg()
    transports = tuple(t for t in producer.transports if t.name == over)
    if not transports:
        raise RuntimeError(f"the workers have no transport {over!r} here")

    def bind(ticket: KVTicket) -> _Decode:
        leg = gateway.new_leg()
        request = Request(leg.request_id, prompt, sampling)
        gateway.send("decode-0", Bind(leg, request, ticket, transports, producer.host_id))
        return _Decode(gateway, leg)

    gateway.send("prefill-0", Submit(on_p, Request(on_p.request_id, prompt, sampling)))
    admitted_at, admitted = await gateway.expect(on_p, Admitted)
    assert admitted.ticket is not None, "a prefill has one"
    early = bind(admitted.ticket)
    first_at, _ = await gateway.expect(on_p, TokenChunk)
    early_made = await early.run(first_at)
    bound_at, late = time.perf_counter(), bind(admitted.ticket)
    late_made = await late.run(bound_at)
    gateway.send("prefill-0", Release(on_p))
    return Prompt(
        prefill=(first_at - admitted_at) * 1e3,
        early=early_made,
        late=late_made,
        bare=late.stats.duration_ms,
        num_bytes=late.stats.num_bytes,
    )
