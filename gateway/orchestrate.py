"""The gateway's routing side on asyncio: sessions and discovery feed the dispatcher, streams take
from it. Implements `baton.gateway.backend.Backend`; everything runs on one event loop.
"""

import asyncio
import logging
import time
from collections import deque
from dataclasses import replace

from baton.config import GatewayConfig
from baton.errors import BatonError, Cause
from baton.gateway.backend import (
    ClusterView,
    RequestReport,
    RequestStream,
    ServedModel,
    WorkerState,
    WorkerView,
)
from baton.gateway.discovery import Discovery
from baton.gateway.dispatch import DispatchConfig, Dispatcher
from baton.gateway.handovers import HandOverWatch
from baton.gateway.legs import Emit, Ended, MachineConfig, Planner
from baton.gateway.mover import MoverConfig
from baton.gateway.pooling_fleet import PoolingFleet
from baton.gateway.prefix_plan import PrefixConfig
from baton.gateway.readiness import Readiness
from baton.gateway.request_machine import RequestMachine
from baton.gateway.router import RouterConfig
from baton.gateway.scores import fetch_scores, score
from baton.gateway.sessions import SessionConfig, WorkerSession, fetch_inventory
from baton.grants import GrantKeys
from baton.locality import PrefixIndex
from baton.messages import GatewayMessage, StepBatch
from baton.pooling import PoolingRequest
from baton.rpc import ClusterToken
from baton.types import BlockHash, Logprobs, Request, Role, TokenChunk, WorkerInfo, WorkerSnapshot

log = logging.getLogger(__name__)


class Stream:
    """A `RequestStream`. Holds at most what `max_tokens` allows for each choice."""

    def __init__(self, orchestrator: "Orchestrator", request_id: str) -> None:
        self._orchestrator = orchestrator
        self._request_id = request_id
        self.is_probe = False
        self._machine: RequestMachine | None = None
        self._chunks: deque[TokenChunk] = deque()
        self._ended: Ended | None = None
        self._aborted = False
        self._waiter: asyncio.Future[None] | None = None  # of the one who iterates

    def attach(self, machine: RequestMachine) -> None:
        self._machine = machine

    def deliver(self, effect: Emit | Ended) -> None:
        if isinstance(effect, Ended):
            self._ended = effect
        else:
            self._chunks.append(effect.chunk)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> TokenChunk:
        while not self._chunks:
            if self._aborted:
                raise StopAsyncIteration
            if self._ended is not None:
                if self._ended.cause is None:
                    raise StopAsyncIteration
                raise BatonError(self._ended.cause, self._ended.message)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._chunks.popleft()

    def finish_choice(self, choice: int) -> None:
        self._orchestrator.finish_choice(self._request_id, choice)

    def abort(self) -> None:
        self._aborted = True
        self._chunks.clear()
        self._orchestrator.cancel(self._request_id)

    @property
    def report(self) -> RequestReport:
        return RequestReport() if self._machine is None else self._machine.report


class Orchestrator:
    """`start`, then serve; `drain` refuses new requests; `close` ends everything."""

    def __init__(self, config: GatewayConfig, session_config: SessionConfig | None = None) -> None:
        self._token = ClusterToken(tuple(s.get_secret_value() for s in config.cluster_token))
        self._session_config = session_config or SessionConfig()
        self._index = PrefixIndex()
        self._dispatcher = Dispatcher(
            self._index,
            _dispatch_config(config),
            GrantKeys(config.cluster, self._token.secrets),
            send=self._send,
            deliver=self._deliver,
            drop=self._drop,
        )
        self._discovery = _discovery(config, self._index, self)
        self._poolers = PoolingFleet(self._token, config.max_pending_requests)
        self._readiness = Readiness(self._dispatcher.fleet, self._open_probe)
        self._hand_overs = HandOverWatch()
        self._sessions: dict[str, WorkerSession] = {}
        self._streams: dict[str, Stream] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._wake_ms = float("inf")  # when it is due
        self._draining = False

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._discovery.run(), name="discovery"),
            asyncio.create_task(self._readiness.run(), name="readiness"),
        ]

    def drain(self) -> None:
        """Refuse new requests; open ones go on."""
        self._draining = True

    async def close(self) -> None:
        """Cut what is still open, end every session. Idempotent."""
        self._draining = True
        for request_id in list(self._streams):
            self.cancel(request_id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        sessions, self._sessions = self._sessions, {}
        await asyncio.gather(*(session.close() for session in sessions.values()), *self._closing)
        await self._poolers.close()
        if self._timer is not None:
            self._timer.cancel()

    # ── Backend ──────────────────────────────────────────────────────────────────────────────────

    def models(self) -> tuple[ServedModel, ...]:
        infos = [w.info for w in self._dispatcher.fleet if w.state is WorkerState.UP]
        if not infos:
            return self._poolers.models()
        first = infos[0]
        shortest = min(info.max_model_len for info in infos)
        generators = (
            ServedModel(name, shortest, first.vocab_size, first.eos_token_ids)
            for name in sorted({info.model for info in infos})
        )
        return (*generators, *self._poolers.models())

    def ready(self) -> bool:
        return not self._draining and (self._readiness.is_ready() or self._poolers.is_ready())

    def topology(self) -> ClusterView:
        view = self._dispatcher.fleet.view()
        up = (*view.workers, *self._poolers.view())
        known = {worker.worker_id for worker in up}
        waiting = [s.info for name, s in sorted(self._sessions.items()) if name not in known]
        workers = (*up, *(_connecting(info) for info in waiting))
        self._look_for_hand_overs()
        return replace(
            view,
            workers=workers,
            hand_overs=self._hand_overs.view(),
            conflicts=self._readiness.conflicts(),
            is_redis_reachable=bool(self._discovery.reachable),
            num_parked=self._dispatcher.num_parked,
        )

    def open(self, request: Request) -> RequestStream:
        if self._draining:
            raise BatonError(Cause.DRAINING, "the gateway is draining")
        return self._open(request, None)

    async def score(self, request: Request) -> tuple[Logprobs, ...]:
        if self._draining:
            raise BatonError(Cause.DRAINING, "the gateway is draining")
        return await score(
            self._dispatcher.fleet, request, lambda info, r: fetch_scores(info, self._token, r)
        )

    async def pool(self, model: str, request: PoolingRequest) -> tuple[bytes, ...]:
        if self._draining:
            raise BatonError(Cause.DRAINING, "the gateway is draining")
        return await self._poolers.pool(model, request)

    def finish_choice(self, request_id: str, choice: int) -> None:
        self._dispatcher.finish_choice(request_id, choice, self._now_ms())
        self._set_timer()

    def cancel(self, request_id: str) -> None:
        self._dispatcher.cancel(request_id, self._now_ms())
        self._set_timer()

    def _open_probe(self, request: Request, planner: Planner) -> RequestStream:
        return self._open(request, planner)

    def _open(self, request: Request, planner: Planner | None) -> RequestStream:
        stream = self._streams[request.request_id] = Stream(self, request.request_id)
        stream.is_probe = planner is not None
        try:
            stream.attach(self._dispatcher.open(request, self._now_ms(), planner))
        except BatonError:
            del self._streams[request.request_id]
            raise
        self._set_timer()
        return stream

    # ── membership (called by discovery) ─────────────────────────────────────────────────────────

    def worker_registered(self, info: WorkerInfo) -> None:
        session = self._sessions.get(info.worker_id)
        if session is not None:
            if session.is_up and session.info.incarnation == info.incarnation:
                return
            self._close_session(info.worker_id)
        self._sessions[info.worker_id] = WorkerSession(
            info, self._token, self, self._session_config
        )

    def worker_unregistered(self, info: WorkerInfo) -> None:
        """A live session outlives its registration (Redis flushed); a dead one does not."""
        session = self._sessions.get(info.worker_id)
        if session is not None and not session.is_up:
            self._close_session(info.worker_id)
            self._forget(info.worker_id)

    def _forget(self, worker_id: str) -> None:
        self._dispatcher.fleet.forget(worker_id)
        self._poolers.forget(worker_id)

    async def inventory(self, info: WorkerInfo) -> tuple[int, list[BlockHash]]:
        return await fetch_inventory(info, self._token)

    def _close_session(self, worker_id: str) -> None:
        session = self._sessions.pop(worker_id, None)
        if session is None:
            return
        task = asyncio.create_task(session.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # ── sessions (SessionListener) ───────────────────────────────────────────────────────────────

    def session_up(self, info: WorkerInfo) -> None:
        log.info("session with %s (%s) is up", info.worker_id, info.role)
        if info.role is Role.POOLING:
            self._poolers.joined(info)
            return
        self._dispatcher.worker_joined(info, self._now_ms())
        self._readiness.fleet_changed()
        self._set_timer()

    def session_batch(self, worker_id: str, batch: StepBatch) -> None:
        if worker_id in self._poolers:
            self._poolers.received(worker_id, batch)
            return
        self._dispatcher.received(worker_id, batch, self._now_ms())
        self._set_timer()

    def session_lost(self, worker_id: str, reason: str) -> None:
        self._poolers.lost(worker_id)
        self._dispatcher.worker_lost(worker_id, self._now_ms())
        self._readiness.fleet_changed()
        if worker_id not in self._discovery.members:
            self._close_session(worker_id)
            self._forget(worker_id)
        self._set_timer()

    # ── the dispatcher's callbacks ───────────────────────────────────────────────────────────────

    def _send(self, worker_id: str, message: GatewayMessage) -> None:
        session = self._sessions.get(worker_id)
        if session is not None:
            session.send(message)

    def _deliver(self, request_id: str, effect: Emit | Ended) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.deliver(effect)
            if isinstance(effect, Ended):
                del self._streams[request_id]
                if not stream.is_probe:
                    self._look_for_hand_overs()
                    self._hand_overs.served(stream.report.path)

    def _look_for_hand_overs(self) -> None:
        roles = {worker.role for worker in self._dispatcher.fleet if worker.accepts}
        self._hand_overs.fleet_changed(roles >= {Role.PREFILL, Role.DECODE})

    def _drop(self, worker_id: str) -> None:
        session = self._sessions.get(worker_id)
        if session is not None:
            session.drop("its engine does not finish a step")

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def _now_ms() -> float:
        return time.monotonic() * 1e3  # a loop's own clock may count in whole milliseconds

    def _set_timer(self) -> None:
        wake_ms = self._dispatcher.next_wake_ms
        if wake_ms == self._wake_ms:
            return
        self._wake_ms = wake_ms
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake_ms < float("inf"):
            delay_s = max(wake_ms - self._now_ms(), 0.0) / 1e3
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer, self._wake_ms = None, float("inf")
        self._dispatcher.tick(self._now_ms())
        self._set_timer()


def _dispatch_config(config: GatewayConfig) -> DispatchConfig:
    return DispatchConfig(
        machine=MachineConfig(slo_ttft_ms=config.slo_ttft_ms or float("inf")),
        router=RouterConfig(
            slo_tpot_ms=config.slo_tpot_ms,
            prefers_faster_local=config.local_prefill == "auto",
            prefixes=PrefixConfig(fetching=config.prefix_fetch),
        ),
        mover=MoverConfig(rebalances=config.rebalance),
        max_pending_requests=config.max_pending_requests,
    )


def _discovery(config: GatewayConfig, index: PrefixIndex, owner: Orchestrator) -> Discovery:
    if config.redis_url is None:
        raise ValueError("a gateway needs --redis-url")
    return Discovery(
        config.redis_url,
        config.cluster,
        [secret.get_secret_value() for secret in config.cluster_token],
        index,
        on_join=owner.worker_registered,
        on_leave=owner.worker_unregistered,
        inventory=owner.inventory,
    )


def _connecting(info: WorkerInfo) -> WorkerView:
    return WorkerView(
        worker_id=info.worker_id,
        role=info.role,
        state=WorkerState.CONNECTING,
        model=info.model,
        pid=info.pid,
        address=info.address,
        host_id=info.host_id,
        device=info.device,
        block_size=info.layout.block_size,
        snapshot=WorkerSnapshot(role=info.role, total_blocks=info.num_blocks),
    )
