"""All requests of one gateway and the fleet they run on, without I/O: what the asyncio gateway and
the simulator both drive.

Messages of workers go in; messages to workers and tokens for clients come out through two
callbacks, which must only put things into buffers. Requests that wait for room are woken earliest
deadline first. One that has waited long is not passed by others any more: while it waits, nobody
else gets room.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from baton.errors import BatonError, Cause
from baton.gateway import router
from baton.gateway.backend import WorkerState
from baton.gateway.legs import Effect, Emit, Ended, MachineConfig, Planner, Send, TransferStarted
from baton.gateway.migration import MigratingMachine
from baton.gateway.mover import Mover, MoverConfig, is_leaving
from baton.gateway.prefix_plan import PrefixPlan
from baton.gateway.router import DecodeDecision, Need, Refusal, RouteDecision, RouterConfig
from baton.gateway.timers import Timers
from baton.gateway.workers import Fleet, Worker
from baton.grants import Grant, GrantKeys
from baton.hashing import next_hash, root_hash, salt_digest
from baton.messages import GatewayMessage, LegMessage, PrefixSource, StepBatch
from baton.types import HASH_TOKENS, BlockHash, Request, WorkerInfo

GRANT_MS = 30_000  # of a grant, from when its source first sees it
_WAKES_PER_EVENT = 8  # parked requests tried in vain before the rest is left for the next event


class PrefixIndex(Protocol):
    """Who holds which prefix (`baton.locality`)."""

    def longest_prefix(self, hashes: Iterable[BlockHash]) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    machine: MachineConfig = field(default_factory=MachineConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    mover: MoverConfig = field(default_factory=MoverConfig)
    max_pending_requests: int = 1024
    claim_after_ms: float = 1000.0  # a request that has waited this long is not passed any more


@dataclass(slots=True)
class _Planner:
    """The router as one request sees it."""

    dispatcher: "Dispatcher"
    request: Request
    _hashes: dict[bytes, list[BlockHash]] = field(default_factory=dict)

    def plan(self, need: Need) -> RouteDecision | Refusal:
        dispatcher = self.dispatcher
        if dispatcher.must_queue(self.request.request_id):
            # Prefill may go on; room to decode is for the one who waits.
            taken = {worker.worker_id for worker in dispatcher.fleet if worker.role.can_decode}
            need = replace(need, avoid=need.avoid | taken)
        decision = router.plan(self._with_hits(need), dispatcher.fleet, dispatcher.config.router)
        if isinstance(decision, RouteDecision) and decision.prefix is not None:
            return replace(decision, source=self._source(decision.worker_id, decision.prefix))
        return decision

    def _source(self, target_id: str, plan: PrefixPlan) -> PrefixSource:
        """With a grant for this target and this request alone."""
        source, target = self.info(plan.worker_id), self.info(target_id)
        hashes = self._hashes[target.fingerprint]  # at least as far as the plan's hit
        grant = Grant(
            nonce=secrets.token_bytes(16),
            source_incarnation=source.incarnation,
            consumer_incarnation=target.incarnation,
            fingerprint=target.fingerprint,
            salt_digest=salt_digest(self.request.salt),
            last_hash=hashes[plan.num_tokens // HASH_TOKENS - 1],
            num_tokens=plan.num_tokens,
            duration_ms=GRANT_MS,
        )
        return PrefixSource(
            source.worker_id,
            source.transports,
            source.host_id,
            self.dispatcher.grant_keys.sign(grant),
            plan.predicted_ms,
            plan.deadline_ms,
        )

    def pick_decode(self, need: Need, source_id: str) -> DecodeDecision | Refusal:
        dispatcher = self.dispatcher
        source = dispatcher.fleet.get(source_id)
        assert source is not None, "a request holds a lease on a worker that is in the fleet"
        if dispatcher.must_queue(self.request.request_id):
            return _BEHIND
        need = self._with_hits(need)
        return router.pick_decode(need, source, dispatcher.fleet, dispatcher.config.router)

    def local_ms(self, need: Need, worker_id: str, num_cached_tokens: int) -> float:
        worker = self.dispatcher.fleet.get(worker_id)
        assert worker is not None, "a leg is on a worker that is in the fleet"
        return router.local_ms(need, worker, self.dispatcher.fleet, num_cached_tokens)

    def info(self, worker_id: str) -> WorkerInfo:
        worker = self.dispatcher.fleet.get(worker_id)
        assert worker is not None, "the router names workers of the fleet"
        return worker.info

    def _with_hits(self, need: Need) -> Need:
        hits: dict[str, int] = {}
        for fingerprint in {worker.info.fingerprint for worker in self.dispatcher.fleet}:
            hits |= self.dispatcher.index.longest_prefix(self._hashes_for(fingerprint))
        return replace(need, hits=hits)

    def _hashes_for(self, fingerprint: bytes) -> Iterator[BlockHash]:
        """Each is made when it is asked for: of a prompt that nobody holds, only the first is."""
        hashes, token_ids = self._hashes.setdefault(fingerprint, []), self.request.prompt_token_ids
        yield from hashes
        parent = hashes[-1] if hashes else root_hash(fingerprint, self.request.salt)
        start = len(hashes) * HASH_TOKENS
        for stop in range(start + HASH_TOKENS, len(token_ids) + 1, HASH_TOKENS):
            parent = next_hash(parent, token_ids[stop - HASH_TOKENS : stop])
            hashes.append(parent)
            yield parent


_BEHIND = Refusal(Cause.NO_ROOM, "another request has waited longer")


class Dispatcher:
    """send: puts a message into a worker's outgoing queue. deliver: hands Emit and Ended to a
    request's stream. drop: closes the session of a worker that is stuck, which then is lost."""

    def __init__(
        self,
        index: PrefixIndex,
        config: DispatchConfig,
        grant_keys: GrantKeys,
        *,
        send: Callable[[str, GatewayMessage], None],
        deliver: Callable[[str, Emit | Ended], None],
        drop: Callable[[str], None],
    ) -> None:
        self.fleet = Fleet()
        self.index = index
        self.config = config
        self.grant_keys = grant_keys
        self._send = send
        self._deliver = deliver
        self._drop = drop
        self._machines: dict[str, MigratingMachine] = {}
        self._parked: dict[str, float] = {}  # request → since when
        self._timers = Timers()
        self._claim: str | None = None
        self._mover = Mover(config.mover)

    @property
    def machines(self) -> Mapping[str, MigratingMachine]:
        return self._machines

    @property
    def num_parked(self) -> int:
        """Requests that wait for room."""
        return len(self._parked)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def open(
        self, request: Request, now_ms: float, planner: Planner | None = None
    ) -> MigratingMachine:
        """Start a request, over a route of its own if it comes with a planner.

        Raises:
            BatonError: OVERLOADED, or why the router refuses it (NO_WORKER, NEVER_FITS, DRAINING).
        """
        if len(self._machines) >= self.config.max_pending_requests:
            raise BatonError(Cause.OVERLOADED, "too many open requests")
        planner = planner or _Planner(self, request)
        machine = MigratingMachine(request, planner, self.config.machine, now_ms)
        effects = machine.start(now_ms)
        if machine.ended is not None and machine.ended.cause is not None:
            raise BatonError(machine.ended.cause, machine.ended.message)
        self._machines[request.request_id] = machine
        self._carry_out(request.request_id, machine, effects, now_ms)
        return machine

    def finish_choice(self, request_id: str, choice: int, now_ms: float) -> None:
        machine = self._machines.get(request_id)
        if machine is not None:
            effects = machine.on_choice_finished(choice, now_ms)
            self._carry_out(request_id, machine, effects, now_ms)

    def cancel(self, request_id: str, now_ms: float) -> None:
        machine = self._machines.get(request_id)
        if machine is not None:
            self._carry_out(request_id, machine, machine.on_cancel(now_ms), now_ms)

    # ── workers ──────────────────────────────────────────────────────────────────────────────────

    def worker_joined(self, info: WorkerInfo, now_ms: float) -> None:
        """A session said Hello; an earlier one to the same worker has been reported lost."""
        self.fleet.joined(info)
        for request_id, machine in list(self._machines.items()):
            effects = machine.on_worker_back(info.incarnation, now_ms)
            self._carry_out(request_id, machine, effects, now_ms)
        self._wake_parked(now_ms)

    def worker_lost(self, worker_id: str, now_ms: float) -> None:
        self.fleet.lost(worker_id)
        for request_id, machine in list(self._machines.items()):
            effects = machine.on_worker_lost(worker_id, now_ms)
            self._carry_out(request_id, machine, effects, now_ms)

    def received(self, worker_id: str, batch: StepBatch, now_ms: float) -> None:
        """One StepBatch of a live session."""
        worker = self.fleet.get(worker_id)
        if worker is None or worker.state is WorkerState.LOST:
            return
        before = (worker.free_blocks, -worker.num_sequences, worker.accepts, worker.role)
        self.fleet.received(worker_id, batch, now_ms)
        step_ms = 0.0 if batch.timing is None else batch.timing.duration_ms
        by_request: dict[str, list[LegMessage]] = {}
        for message in batch.messages:
            by_request.setdefault(message.leg.request_id, []).append(message)
        for request_id, messages in by_request.items():
            machine = self._machines.get(request_id)
            if machine is None:
                continue
            emit = machine.pass_on(messages[0], now_ms) if len(messages) == 1 else None
            if emit is not None:
                self._deliver(request_id, emit)
                continue
            effects = machine.on_messages(messages, now_ms, step_ms)
            self._carry_out(request_id, machine, effects, now_ms)
        if worker.state is WorkerState.STUCK:
            self._drop(worker_id)
        elif self._parked:
            after = (worker.free_blocks, -worker.num_sequences, worker.accepts, worker.role)
            if before != after:
                self._wake_parked(now_ms)
        self._move(worker, now_ms)

    def _move(self, worker: Worker, now_ms: float) -> None:
        """Let requests change their workers, if it is time to; let go of leases on one that ends.

        Level-triggered: whatever did not work is tried again with a later batch."""
        for request_id, cause in self._mover.due(self.fleet, self._machines, now_ms):
            machine = self._machines[request_id]
            self._carry_out(request_id, machine, machine.migrate(cause, now_ms), now_ms)
        for request_id, machine in list(self._machines.items()) if is_leaving(worker) else ():
            effects = machine.on_drain(worker.worker_id, now_ms)
            self._carry_out(request_id, machine, effects, now_ms)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def next_wake_ms(self) -> float:
        """When `tick` has something to do; infinity when only messages can change anything."""
        return self._timers.next_ms

    def tick(self, now_ms: float) -> None:
        """Wake every request whose time has come, earliest deadline first."""
        for request_id in sorted(self._timers.pop_due(now_ms), key=self._urgency):
            self._wake(request_id, now_ms)

    def must_queue(self, request_id: str) -> bool:
        """Somebody who has waited too long comes first."""
        return self._claim is not None and self._claim != request_id

    def _wake_parked(self, now_ms: float) -> None:
        failures = 0
        for request_id in sorted(self._parked, key=self._urgency):
            self._wake(request_id, now_ms)
            since_ms = self._parked.get(request_id)
            if since_ms is None:
                continue
            failures += 1
            if self._claim is None and now_ms - since_ms >= self.config.claim_after_ms:
                self._claim = request_id
            if self._claim is not None or failures >= _WAKES_PER_EVENT:
                return

    def _wake(self, request_id: str, now_ms: float) -> None:
        machine = self._machines.get(request_id)
        if machine is not None:
            self._carry_out(request_id, machine, machine.on_wake(now_ms), now_ms)

    def _urgency(self, request_id: str) -> tuple[float, float]:
        return self._machines[request_id].deadline_ms, self._parked.get(request_id, 0.0)

    def _carry_out(
        self, request_id: str, machine: MigratingMachine, effects: list[Effect], now_ms: float
    ) -> None:
        for effect in effects:
            match effect:
                case Emit() | Ended():
                    self._deliver(request_id, effect)
                case Send(worker_id, message):
                    self.fleet.sent(worker_id, message)
                    self._send(worker_id, message)
                case TransferStarted(leg, source, target, num_bytes):
                    self.fleet.transfer_started(leg, source, target, num_bytes)
        if machine.ended is not None:
            self._machines.pop(request_id, None)
        if machine.is_parked:
            self._parked.setdefault(request_id, now_ms)
        elif self._parked.pop(request_id, None) is not None and self._claim == request_id:
            self._claim = None
        self._timers.set(request_id, machine.wake_at_ms)
