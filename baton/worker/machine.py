"""Everything a worker decides, without I/O: sessions, legs, leases, reservations, drain.

How to drive it (the servicer does, and so does tests/sim): call the method that matches what
happened and carry out the returned effects in order. Time is passed in: integer milliseconds of one
monotonic clock.

    happened                                            call
    a gateway connected / its stream ended              session_opened / session_lost
    a GatewayMessage came                               receive
    the engine handed over a StepOutput                 step
    a consumer asks for KV / gives up before the answer attach / cancel_attach
    it took frames / verified all / stopped reading     attachment_progress / _done / _closed
    a fetch of ours got a frame / ended / ended early   fetch_progress / fetch_ended / fetch_failed
    layers of a running step became ready               layers_ready
    about 100 ms passed                                 tick
    the process shall stop / must stop now              drain / hand_over

    effect                              carry it out by
    Send, CloseSession                  writing to, or closing, that gateway's stream
    Post                                posting the command to the engine
    FetchKV, CancelFetch                starting or cancelling a fetch; then exactly one fetch_ended
                                        or fetch_failed per FetchKV, after its last write
    AttachGranted, AttachRefused        answering the attach with the same key; then, for a granted
                                        one, exactly one attachment_closed after its last read
    AttachmentReady, -Sampled           waking the readers of these epochs
    CutAttachment                       ending that reader with the cause

A worker is both sides at once: `ProducerSide` (prefill legs, leases) and `ConsumerSide` (decode and
local legs, reservations). Beside them, prefixes by hash: `PrefixFetches` (ours, of either's legs)
and `PrefixPins` (what others read here). This class knows whose a leg is and refuses what cannot
be.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from baton.engine.events import LegEvent, LegFailed, LegTokens, PrefixReserved, StepOutput
from baton.errors import BatonError, Cause
from baton.grants import GrantKeys, HashChain
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import KVSource
from baton.kvtransfer.ticket import TicketKeyring
from baton.messages import (
    Abort,
    Bind,
    ComputeLocally,
    Failed,
    GatewayMessage,
    Heartbeat,
    Hello,
    Queued,
    Rebind,
    Release,
    StepBatch,
    Submit,
)
from baton.totals import WorkerTotals
from baton.types import (
    KVRange,
    LegId,
    LinkRate,
    Role,
    TokenChunk,
    TransferStats,
    WorkerInfo,
    WorkerSnapshot,
)
from baton.worker.checks import check_request
from baton.worker.consumer import ConsumerSide
from baton.worker.effects import CloseSession, Effect, Send, SessionId
from baton.worker.outbox import Outbox
from baton.worker.policy import PrefillPredictor, WorkerPolicy
from baton.worker.prefix_fetches import PrefixFetches
from baton.worker.prefix_pins import PrefixPins
from baton.worker.producer import ProducerSide

FORGET_LEG_MS = 60_000  # longer than anything about a dead leg can still be under way
MAX_REMEMBERED_LEGS = 100_000
MAX_TICK_MS = 1_000  # what one tick adds to a silence: our own pause is nobody's death


@dataclass(slots=True)
class _Session:
    silence_ms: int = 0


class WorkerMachine:
    """One worker. See the module docstring."""

    def __init__(
        self,
        info: WorkerInfo,
        policy: WorkerPolicy,
        keyring: TicketKeyring,
        predictor: PrefillPredictor,
        grant_keys: GrantKeys,
        first_epoch: int | None = None,
        random_id: Callable[[], bytes] = lambda: secrets.token_bytes(16),
        step_age_ms: Callable[[], float] = lambda: 0.0,
        link_rates: Callable[[], tuple[LinkRate, ...]] = tuple,
        totals: Callable[[], WorkerTotals] = WorkerTotals,
    ) -> None:
        """
        Args:
            step_age_ms: for how long the engine's present step has been running.
            link_rates: what is known of the links to other workers.
            totals: what this worker has counted.
            first_epoch, random_id: where epochs start and how transfer ids are drawn; given only
                to make a run repeatable.
        """
        self._info = info
        self._policy = policy
        self._outbox = Outbox()
        epoch = secrets.randbits(64) if first_epoch is None else first_epoch
        self.prefixes = PrefixFetches(info, policy, self._outbox)
        self.producer = ProducerSide(
            info, policy, keyring, predictor, self._outbox, self.prefixes, epoch, random_id
        )
        self.consumer = ConsumerSide(info, policy, predictor, self._outbox, self.prefixes)
        self.pins = PrefixPins(
            info, policy, grant_keys, self._outbox, self.producer.leases.mint_epoch
        )
        self._sessions: dict[SessionId, _Session] = {}
        self._used_legs: dict[LegId, int] = {}  # → when last known alive; oldest first
        self._snapshot = WorkerSnapshot(
            policy.role, free_blocks=info.num_blocks, total_blocks=info.num_blocks
        )
        self._step_age_ms = step_age_ms
        self._link_rates = link_rates
        self._totals = totals
        self._ticked_at_ms = 0
        self._role = policy.role
        self._draining = False

    # ── state ────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def is_idle(self) -> bool:
        """No leg, lease, attachment or reservation is open."""
        producer, consumer = self.producer, self.consumer
        is_busy = producer or producer.leases or consumer or consumer.reservations
        return not (is_busy or self.prefixes or self.pins)

    def snapshot(self) -> WorkerSnapshot:
        """The engine's last word, with what only the worker knows."""
        return replace(
            self._snapshot,
            role=self._role,
            draining=self._draining,
            num_leases=len(self.producer.leases),
            step_age_ms=self._step_age_ms(),
            link_rates=self._link_rates(),
        )

    def set_role(self, role: Role) -> None:
        """A role is a hint to routers; every worker goes on doing everything."""
        self._role = role

    # ── sessions ─────────────────────────────────────────────────────────────────────────────────

    def session_opened(self, session: SessionId, now_ms: int) -> list[Effect]:
        self._sessions[session] = _Session()
        return [Send(session, Hello(replace(self._info, role=self._role)))]

    def session_lost(self, session: SessionId, now_ms: int) -> list[Effect]:
        """Everything of that gateway is aborted, its leases released. Unknown sessions are
        ignored."""
        if self._sessions.pop(session, None) is not None:
            for leg in (*self.producer.legs_of(session), *self.consumer.legs_of(session)):
                self._abort(leg)
        self._outbox.forget(session)
        return self._flush()

    def receive(self, session: SessionId, message: GatewayMessage, now_ms: int) -> list[Effect]:
        known = self._sessions.get(session)
        if known is None:
            return []
        known.silence_ms = 0
        if isinstance(message, Heartbeat):
            snapshot, totals = self.snapshot(), self._totals()
            return [Send(session, StepBatch((), snapshot, None, message.seq, totals))]
        try:
            self._handle(session, message, now_ms)
        except BatonError as error:
            return self.reject(session, message.leg, error, now_ms)
        return self._flush()

    def reject(
        self, session: SessionId, leg: LegId, error: BatonError, now_ms: int
    ) -> list[Effect]:
        """A message about this leg cannot be handled; if it is the session's, it is over."""
        if self._owner(leg) == session:
            self._abort(leg)
        if session in self._sessions:
            self._outbox.tell(session, Failed(leg, error.cause, error.message))
        return self._flush()

    def _handle(self, session: SessionId, message: GatewayMessage, now_ms: int) -> None:
        match message:
            case Submit(leg, request) if running := self.consumer.running(session, leg.request_id):
                # To be let in while draining: it is how what runs here gets away.
                self._check_unused(leg)
                check_request(request, self._info)
                self.producer.share(session, leg, request, running, now_ms)
                self._used_legs[leg] = now_ms
                self._outbox.tell(session, Queued(leg))
            case Submit(leg, request):
                self._check_new(leg)
                check_request(request, self._info)
                free_blocks = self._snapshot.free_blocks
                if self.producer.submit(session, message, free_blocks, now_ms):
                    self._used_legs[leg] = now_ms
                    self._outbox.tell(session, Queued(leg))
            case Bind(leg, request, ticket, transports, host_id):
                self._check_new(leg)
                check_request(request, self._info)
                source = KVSource(ticket, transports, host_id)
                self.consumer.bind(session, leg, request, source, now_ms)
                self._used_legs[leg] = now_ms
            case Rebind(leg, ticket, transports, host_id):
                self._check_owner(session, leg)
                self.consumer.rebind(leg, KVSource(ticket, transports, host_id), now_ms)
            case ComputeLocally(leg) if leg in self.consumer:
                self._check_owner(session, leg)
                check_request(message.request, self._info)
                self.consumer.compute_locally(session, message, now_ms)
            case ComputeLocally(leg, request):
                self._check_new(leg)
                check_request(request, self._info)
                self.consumer.compute_locally(session, message, now_ms)
                self._used_legs[leg] = now_ms
                self._outbox.tell(session, Queued(leg))
            case Abort(leg, None) | Release(leg):
                if self._owner(leg) == session:
                    self._abort(leg)
            case Abort(leg, choice) if choice is not None:
                if self._owner(leg) == session:
                    self.producer.abort_choice(leg, choice, now_ms)
                    self.consumer.abort_choice(leg, choice)

    # ── legs ─────────────────────────────────────────────────────────────────────────────────────

    def _check_new(self, leg: LegId) -> None:
        """May this leg begin?

        Raises:
            BatonError: DRAINING, OVERLOADED, PROTOCOL.
        """
        self._check_unused(leg)
        if self._draining:
            raise BatonError(Cause.DRAINING, "the worker is shutting down")

    def _check_unused(self, leg: LegId) -> None:
        """
        Raises:
            BatonError: OVERLOADED, PROTOCOL (the id was used before: what is still under way about
                the old leg would be taken for the new one's).
        """
        if leg in self._used_legs:
            raise BatonError(Cause.PROTOCOL, "the leg id was used before")
        if len(self._used_legs) >= MAX_REMEMBERED_LEGS:
            raise BatonError(Cause.OVERLOADED, "too many legs in a short time")

    def _owner(self, leg: LegId) -> SessionId | None:
        if leg in self.producer:
            return self.producer.session_of(leg)
        return self.consumer.session_of(leg) if leg in self.consumer else None

    def _check_owner(self, session: SessionId, leg: LegId) -> None:
        if leg not in self.consumer or self._owner(leg) != session:
            raise BatonError(Cause.PROTOCOL, "no such leg")

    def _abort(self, leg: LegId) -> None:
        self.producer.abort(leg)
        self.consumer.abort(leg)

    def _fail(self, legs: Iterable[LegId], cause: Cause, detail: str) -> None:
        for leg in legs:
            session = self._owner(leg)
            self._abort(leg)
            if session is not None:
                self._outbox.tell(session, Failed(leg, cause, detail))

    # ── the engine ───────────────────────────────────────────────────────────────────────────────

    def step(self, output: StepOutput, now_ms: int) -> list[Effect]:
        self._snapshot = output.snapshot
        for event in output.events:
            self._on_event(event, now_ms)
        for pinned in output.pinned:
            self.pins.pinned(pinned, now_ms)
        return self._flush(output)

    def layers_ready(self, leg: LegId, where: KVRange, now_ms: int) -> list[Effect]:
        """Of the step that runs: see `EngineCore.on_kv_ready`."""
        self.producer.layers_ready(leg, where, now_ms)
        return self._flush()

    def engine_refused(self, leg: LegId, error: BatonError, now_ms: int) -> list[Effect]:
        """The engine did not take the command that opens this leg."""
        self._on_event(LegFailed(leg, error.cause, error.message), now_ms)
        return self._flush()

    def _on_event(self, event: LegEvent, now_ms: int) -> None:
        leg = event.chunk.leg if isinstance(event, LegTokens) else event.leg
        if isinstance(event, PrefixReserved):
            self.prefixes.reserved(event, now_ms)
        elif leg in self.producer or leg in self.producer.leases:
            self.producer.on_event(event, now_ms)
        else:
            self.consumer.on_event(event, now_ms)

    # ── the data plane ───────────────────────────────────────────────────────────────────────────

    def attach(self, key: int, fetch: FetchOpen, now_ms: int) -> list[Effect]:
        """A consumer wants KV. `key` is the caller's, unique; see AttachGranted, AttachRefused."""
        if isinstance(fetch.source, HashChain):
            self.pins.attach(key, fetch, fetch.source, self._draining, now_ms)
        else:
            self.producer.attach(key, fetch, now_ms)
        return self._flush()

    def cancel_attach(self, key: int) -> None:
        self.producer.leases.cancel_attach(key)
        self.pins.table.cancel_attach(key)

    def attachment_progress(self, epoch: int, num_sent_tokens: int, now_ms: int) -> None:
        self.producer.leases.progress(epoch, num_sent_tokens, now_ms)
        self.pins.table.progress(epoch, now_ms)

    def attachment_done(self, epoch: int) -> None:
        self.producer.leases.done(epoch)

    def attachment_closed(self, epoch: int, now_ms: int) -> list[Effect]:
        self.producer.attachment_closed(epoch, now_ms)
        self.pins.closed(epoch)
        return self._flush()

    def fetch_progress(self, leg: LegId, now_ms: int) -> None:
        self.consumer.reservations.progress(leg, now_ms)
        self.prefixes.reservations.progress(leg, now_ms)

    def fetch_ended(
        self, leg: LegId, stats: TransferStats, first_tokens: Iterable[TokenChunk], now_ms: int
    ) -> list[Effect]:
        if leg in self.prefixes:
            self.prefixes.fetch_ended(leg, stats, now_ms)
        else:
            self.consumer.fetch_ended(leg, stats, first_tokens, now_ms)
        return self._flush()

    def fetch_failed(
        self, leg: LegId, valid_tokens: int, cause: Cause, detail: str, now_ms: int
    ) -> list[Effect]:
        if leg in self.prefixes:
            self.prefixes.fetch_failed(leg, valid_tokens, cause, detail, now_ms)
        else:
            self.consumer.fetch_failed(leg, valid_tokens, cause, detail, now_ms)
        return self._flush()

    # ── time and the end ─────────────────────────────────────────────────────────────────────────

    def tick(self, now_ms: int) -> list[Effect]:
        """Timers. Legs past their deadline, stalled readers and writers, silent gateways."""
        overdue = (*self.producer.overdue(now_ms), *self.consumer.overdue(now_ms))
        self._fail(overdue, Cause.DEADLINE_EXCEEDED, "the request's deadline has passed")
        self.producer.tick(now_ms)
        self.consumer.tick(now_ms)
        self.prefixes.tick(now_ms)
        self.pins.tick(now_ms)
        self._forget_legs(now_ms)
        effects = self._flush()
        elapsed_ms = min(now_ms - self._ticked_at_ms, MAX_TICK_MS)
        self._ticked_at_ms = now_ms
        for session, known in list(self._sessions.items()):
            known.silence_ms += elapsed_ms
            if known.silence_ms > self._policy.session_timeout_ms:
                effects += self.session_lost(session, now_ms)
                effects.append(CloseSession(session, Cause.SESSION_LOST, "no heartbeat"))
        return effects

    def _forget_legs(self, now_ms: int) -> None:
        while self._used_legs:
            leg, seen_at_ms = next(iter(self._used_legs.items()))
            if now_ms - seen_at_ms < FORGET_LEG_MS:
                break
            del self._used_legs[leg]
            if self._owner(leg) is not None:
                self._used_legs[leg] = now_ms

    def drain(self, now_ms: int) -> list[Effect]:
        """Admit nothing more; what is here goes on. Leases are served until they are released."""
        self._draining = True
        snapshot = self.snapshot()
        return [Send(session, StepBatch((), snapshot)) for session in self._sessions]

    def hand_over(self, now_ms: int) -> list[Effect]:
        """Give every leg back to its gateway, which goes on elsewhere."""
        legs = [leg for s in self._sessions for leg in self.producer.legs_of(s)]
        legs += [leg for s in self._sessions for leg in self.consumer.legs_of(s)]
        self._fail(legs, Cause.DRAINING, "the worker is shutting down")
        self.pins.cut_all()
        return self._flush()

    def _flush(self, output: StepOutput | None = None) -> list[Effect]:
        snapshot = self.snapshot() if self._outbox.has_messages else None
        return self._outbox.take(snapshot, output.timing if output is not None else None)

    def check_integrity(self) -> None:
        """Asserts every invariant; for tests and idle workers."""
        self.producer.check_integrity()
        self.consumer.check_integrity()
        self.prefixes.reservations.check_integrity()
        self.pins.table.check_integrity()
        for leg in self.producer:
            assert leg not in self.consumer, "a leg is on both sides"
            assert self.producer.session_of(leg) in self._sessions, "a leg is nobody's"
        for leg in self.consumer:
            assert self.consumer.session_of(leg) in self._sessions, "a leg is nobody's"
