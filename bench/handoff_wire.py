"""Hand-overs one at a time, with the bench in the gateway's place."""

import asyncio
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from baton.config import ServeConfig
from baton.gateway.discovery import Discovery
from baton.gateway.sessions import SessionConfig, WorkerSession
from baton.locality import PrefixIndex
from baton.messages import (
    Abort,
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
from baton.types import KVTicket, LegId, Request, SamplingParams, TokenChunk, WorkerInfo
from bench.small_fleet import VOCAB

NUM_OUTPUTS = 8
PATIENCE_S = 60.0


class WireGateway:
    """As much of a gateway as it takes: sessions to the workers, and when each message came."""

    def __init__(self, redis_url: str) -> None:
        self._inbox: dict[LegId, asyncio.Queue[tuple[float, LegMessage]]] = defaultdict(
            asyncio.Queue
        )
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
            self._inbox[message.leg].put_nowait((now, message))

    def new_leg(self) -> LegId:
        self._num_legs += 1
        return LegId(f"bench{self._num_legs}", 1)

    def info(self, worker_id: str) -> WorkerInfo:
        return self._sessions[worker_id].info

    def send(self, worker_id: str, message: GatewayMessage) -> None:
        self._sessions[worker_id].send(message)

    async def take(self, leg: LegId) -> tuple[float, LegMessage]:
        """The leg's next message and when it came.

        Raises:
            RuntimeError: the worker refused or failed it.
            TimeoutError: after a minute.
        """
        async with asyncio.timeout(PATIENCE_S):
            at, message = await self._inbox[leg].get()
        if isinstance(message, Failed | KvFailed | NoRoom):
            raise RuntimeError(f"{message}")
        return at, message

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

    prefill: float  # Admitted to first token
    between: float  # first token from P to second token from D
    step: float  # median of the decode steps that follow
    bare: float  # a second fetch of the same KV, all of it ready
    num_bytes: int


class _Bound:
    """Binds one leg of a ticket to D, over one transport, and says when."""

    def __init__(
        self, gateway: WireGateway, prompt: tuple[int, ...], sampling: SamplingParams, over: str
    ) -> None:
        self._gateway = gateway
        self._prompt = prompt
        self._sampling = sampling
        self._producer = gateway.info("prefill-0")
        self._transports = tuple(t for t in self._producer.transports if t.name == over)
        if not self._transports:
            raise RuntimeError(f"the workers have no transport {over!r} here")

    def bind(self, ticket: KVTicket) -> LegId:
        leg = self._gateway.new_leg()
        request = Request(leg.request_id, self._prompt, self._sampling)
        host_id = self._producer.host_id
        self._gateway.send("decode-0", Bind(leg, request, ticket, self._transports, host_id))
        return leg


async def hand_over(gateway: WireGateway, length: int, over: str, is_early: bool) -> HandOver:
    """One prompt of random tokens. `is_early`: D is bound when P has admitted the prompt, else with
    the first token."""
    prompt = tuple(random.randrange(10, VOCAB) for _ in range(length))
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    binding = _Bound(gateway, prompt, sampling, over)
    on_p, on_d = gateway.new_leg(), None
    gateway.send("prefill-0", Submit(on_p, Request(on_p.request_id, prompt, sampling)))
    ticket: KVTicket | None = None
    admitted_at = first_at = 0.0
    while not first_at:
        at, message = await gateway.take(on_p)
        if isinstance(message, Admitted):
            admitted_at, ticket = at, message.ticket
            if is_early and ticket is not None:
                on_d = binding.bind(ticket)
        elif isinstance(message, TokenChunk):
            first_at = at
    assert ticket is not None, "a token before its ticket"
    on_d = on_d or binding.bind(ticket)
    times: list[float] = []
    while len(times) < NUM_OUTPUTS:
        at, message = await gateway.take(on_d)
        times += [at] * isinstance(message, TokenChunk)
    again = binding.bind(ticket)
    while not isinstance(message, Imported) or message.leg != again:
        _, message = await gateway.take(again)
    gateway.send("decode-0", Abort(again))
    gateway.send("prefill-0", Release(on_p))
    return HandOver(
        prefill=(first_at - admitted_at) * 1e3,
        between=(times[1] - first_at) * 1e3,
        step=median((b - a) * 1e3 for a, b in pairwise(times[1:])),
        bare=message.stats.duration_ms,
        num_bytes=message.stats.num_bytes,
    )
