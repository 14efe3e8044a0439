"""One request at the gateway: a pure state machine without I/O; every `now_ms` is passed in.

It owns two legs. The *prefill leg* is on P, from Submit until its lease is released. The *decode
leg* is on D (or on whoever computes locally). Together they make the states of docs/kv-exchange.md,
which has the table. `baton.gateway.migration` adds to it what a change of D under way needs.

A lease is a prefill leg whose first tokens are all here; LeaseLost voids it without touching a
running decode leg. Cancel (client gone), the deadline and DONE are legal in every state: the decode
leg is aborted unless it ended by itself, the prefill leg released (or aborted while it computes).
Nothing ends in silence: in every state but DONE either a leg is at work on a live worker, whose
session reports or is lost, or a timer runs, or the dispatcher wakes the request when room appears.
"""

from collections.abc import Iterable
from dataclasses import replace

from baton.errors import Cause
from baton.gateway.backend import RequestReport
from baton.gateway.commit import OutputLog, resumed
from baton.gateway.legs import (
    TRANSPORT_FAULTS,
    DecodeLeg,
    Effect,
    Emit,
    Ended,
    MachineConfig,
    Phase,
    Planner,
    PrefillLeg,
    Send,
    TransferStarted,
    need_of,
)
from baton.gateway.patience import Patience
from baton.gateway.router import Need, Refusal, RouteDecision
from baton.gateway.timeline import Timeline
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    Failed,
    GatewayMessage,
    Imported,
    KvFailed,
    LeaseLost,
    LegMessage,
    NoRoom,
    PrefixSource,
    Progress,
    Rebind,
    Release,
    Submit,
)
from baton.types import KVTicket, LegId, Request, TokenChunk, WorkerInfo

FORECAST_TRUST = 0.8  # of a prefill's predicted time: late costs a transfer, early costs D memory
_TIMER_MS = 0.1  # forecasts are not finer, and clocks may wake a little early


class RequestMachine:
    """Feed it events, carry out the effects in order. After `Ended` it ignores everything."""

    def __init__(
        self, request: Request, planner: Planner, config: MachineConfig, now_ms: float
    ) -> None:
        self._request = request
        self._planner = planner
        self._config = config
        self._output = OutputLog(request.sampling.n)
        self._prefill: PrefillLeg | None = None
        self._decode: DecodeLeg | None = None
        self._fingerprint: bytes | None = None
        self._patience = Patience(config)
        self._effects: list[Effect] = []
        self._timeline = Timeline(now_ms)
        self._step_began_ms = now_ms
        self.deadline_ms = (
            float("inf") if request.deadline_ms is None else now_ms + request.deadline_ms
        )
        self.wake_at_ms = self.deadline_ms
        self.is_parked = False  # waits for room: wake it when a worker's load changes
        self.ended: Ended | None = None

    @property
    def report(self) -> RequestReport:
        report = self._timeline.report
        return replace(report, num_defects=self.num_defects) if self.num_defects else report

    @property
    def num_defects(self) -> int:
        return self._output.num_defects

    # ── events ───────────────────────────────────────────────────────────────────────────────────

    def start(self, now_ms: float) -> list[Effect]:
        return self._settle(now_ms)

    def on_wake(self, now_ms: float) -> list[Effect]:
        """`wake_at_ms` has come, or (when `is_parked`) a worker's load has changed."""
        return self._settle(now_ms)

    def on_messages(
        self, messages: Iterable[LegMessage], now_ms: float, step_ms: float = 0.0
    ) -> list[Effect]:
        """What one StepBatch says of this request, in order; its step took `step_ms`."""
        self._step_began_ms = now_ms - step_ms
        for message in messages:
            if self.ended is not None:
                break
            leg = self._find(message.leg)
            if isinstance(leg, PrefillLeg):
                self._on_prefill(leg, message, now_ms)
            elif leg is not None:
                self._on_decode(leg, message, now_ms)
            # Anything else is of a superseded leg.
        return self._settle(now_ms)

    def on_worker_lost(self, worker_id: str, now_ms: float) -> list[Effect]:
        """Its session is gone, and with it every leg and lease of this gateway there."""
        if self.ended is not None:
            return []
        dead: bytes | None = None
        if self._prefill is not None and self._prefill.info.worker_id == worker_id:
            dead = None if self._prefill.is_held else self._prefill.info.incarnation
            self._prefill = None
        if self._decode is not None and self._decode.info.worker_id == worker_id:
            dead = self._decode.info.incarnation
            self._decode = None
        if dead is not None:
            self._patience.lost(dead)
            self._timeline.failed(Cause.WORKER_LOST)
        return self._settle(now_ms)

    def on_worker_back(self, incarnation: bytes, now_ms: float) -> list[Effect]:
        """The same process answers again: only the connection had been lost."""
        return self._settle(now_ms) if self._patience.is_back(incarnation) else []

    def on_choice_finished(self, choice: int, now_ms: float) -> list[Effect]:
        """A stop string: the choice needs no more tokens."""
        fresh = self.ended is None and self._output.finish(choice)
        if fresh and self._decode is not None and not self._output.all_finished:
            self._send(self._decode.info, Abort(self._decode.leg, choice))
        return self._settle(now_ms)

    def on_cancel(self, now_ms: float) -> list[Effect]:
        """The client is gone."""
        if self.ended is None:
            self._end(Cause.CANCELLED, "the client is gone")
        return self._settle(now_ms)

    # ── legs ─────────────────────────────────────────────────────────────────────────────────────

    def _find(self, leg: LegId) -> PrefillLeg | DecodeLeg | None:
        if self._prefill is not None and leg == self._prefill.leg:
            return self._prefill
        return self._decode if self._decode is not None and leg == self._decode.leg else None

    def _forget(self, leg: PrefillLeg | DecodeLeg) -> None:
        """It is over."""
        if leg is self._prefill:
            self._prefill = None
        elif leg is self._decode:
            self._decode = None

    # ── messages ─────────────────────────────────────────────────────────────────────────────────

    def _on_prefill(self, leg: PrefillLeg, message: LegMessage, now_ms: float) -> None:
        match message:
            case Admitted(_, num_cached, ticket, prefix):
                if ticket is None:
                    self._leg_failed(leg, Cause.PROTOCOL, "admitted without a ticket", now_ms)
                    return
                leg.ticket = ticket
                need = self._need(now_ms)
                leg.left_ms = self._planner.local_ms(need, leg.info.worker_id, num_cached)
                leg.as_of_ms = now_ms
                self._patience.got_on()
                self._timeline.admitted(num_cached, self._step_began_ms, prefix)
            case Progress(_, _, left_ms):
                leg.left_ms, leg.as_of_ms = left_ms, now_ms
            case TokenChunk():
                self._commit(leg, message, now_ms)
                leg.awaited.discard(message.choice)
            case NoRoom(_, _, retry_after_ms):
                self._patience.avoid(leg.info.worker_id, now_ms, max(retry_after_ms, 1))
                self._forget(leg)
            case LeaseLost():
                leg.is_void = True
            case Failed(_, cause, detail):
                self._leg_failed(leg, cause, detail, now_ms)
            case _:
                pass  # Queued

    def _on_decode(self, leg: DecodeLeg, message: LegMessage, now_ms: float) -> None:
        match message:
            case TokenChunk():  # nearly all of them
                self._commit(leg, message, now_ms)
            case Bound(_, num_cached) if leg.phase is Phase.BINDING:
                leg.phase = Phase.IMPORTING
                self._patience.got_on()
            case Admitted(_, num_cached, _, prefix):
                self._patience.got_on()
                self._timeline.admitted(num_cached, self._step_began_ms, prefix)
            case Imported(_, stats) if leg.phase in {Phase.BINDING, Phase.IMPORTING}:
                leg.phase = Phase.DECODING
                self._timeline.imported(stats)
            case NoRoom(_, _, retry_after_ms):
                self._patience.avoid(leg.info.worker_id, now_ms, max(retry_after_ms, 1))
                self._forget(leg)
            case KvFailed() if leg.phase in {Phase.BINDING, Phase.IMPORTING}:
                leg.phase, leg.failed = Phase.IMPORTING, message
                self._timeline.failed(message.cause)
            case Failed(_, cause, detail):
                self._leg_failed(leg, cause, detail, now_ms)
            case _:
                pass  # Queued, Progress, and what crossed a decision of ours

    def _commit(self, leg: PrefillLeg | DecodeLeg, chunk: TokenChunk, now_ms: float) -> None:
        try:
            new = self._output.commit(chunk)
        except ValueError as error:
            self._leg_failed(leg, Cause.PROTOCOL, str(error), now_ms)
            return
        if new is None:
            return
        self._timeline.committed(now_ms, computed_here=isinstance(leg, DecodeLeg))
        self._effects.append(Emit(new))

    def _leg_failed(
        self, leg: PrefillLeg | DecodeLeg, cause: Cause, detail: str, now_ms: float
    ) -> None:
        """The leg is over on its worker, or must be because what it says makes no sense."""
        self._timeline.failed(cause)
        self._forget(leg)
        if cause is Cause.PROTOCOL:
            self._send(leg.info, Abort(leg.leg))
        if not self._patience.failed(leg.info.worker_id, cause, now_ms):
            self._end(cause, detail or cause.name.lower())

    # ── decisions ────────────────────────────────────────────────────────────────────────────────

    def _settle(self, now_ms: float) -> list[Effect]:
        """Level-triggered: whatever happened, do what the state calls for now."""
        if self.ended is None:
            self.wake_at_ms = self.deadline_ms
            self.is_parked = False
            if self._output.all_finished:
                self._end(None, "")
            elif now_ms >= self.deadline_ms:
                self._end(Cause.DEADLINE_EXCEEDED, "the request's deadline has passed")
            else:
                self._decide(now_ms)
        effects, self._effects = self._effects, []
        return effects

    def _decide(self, now_ms: float) -> None:
        decode, prefill = self._decode, self._prefill
        if decode is not None:
            # A fetch that lost its producer cannot end well, whether or not D knows it already.
            if decode.phase is Phase.IMPORTING and (decode.failed or prefill is None):
                self._repair(decode, now_ms)
            return
        if prefill is not None and prefill.is_void:
            self._drop_prefill()
        verdict_at_ms = self._patience.verdict_at_ms(now_ms)
        if verdict_at_ms is not None:
            if now_ms >= verdict_at_ms:
                self._end(Cause.WORKER_LOST, "several workers were lost computing it")
            else:
                self.wake_at_ms = min(self.wake_at_ms, verdict_at_ms)
        elif self._prefill is None:
            self._route(self._planner.plan(self._need(now_ms)), now_ms)
        elif self._prefill.ticket is not None:
            self._bind(self._prefill, self._prefill.ticket, now_ms)

    def _route(self, decision: RouteDecision | Refusal, now_ms: float) -> None:
        if isinstance(decision, Refusal):
            self._wait(decision, now_ms)
            return
        slo_ms = self._config.slo_ttft_ms
        if self._timeline.num_attempts == 0 and decision.predicted_ttft_ms > slo_ms:
            self._end(Cause.OVERLOADED, "the first token is predicted to miss its objective")
            return
        info = self._planner.info(decision.worker_id)
        leg = self._next_leg(info)
        request = self._request_now(now_ms)
        if decision.remote:
            self._prefill = PrefillLeg(leg, info, set(self._output.open_choices))
            self._timeline.prefills_on(info.worker_id)
            self._send(info, Submit(leg, request, decision.source))
        else:
            self._compute(leg, info, request, decision.source)
        if decision.prefix is not None:
            prefix = decision.prefix
            self._effects.append(
                TransferStarted(leg, prefix.worker_id, info.worker_id, prefix.num_bytes)
            )

    def _compute(
        self, leg: LegId, info: WorkerInfo, request: Request, source: PrefixSource | None = None
    ) -> None:
        self._decode = DecodeLeg(leg, info, Phase.LOCAL)
        self._timeline.prefills_on(info.worker_id)
        self._timeline.decodes_on(info.worker_id)
        self._send(info, ComputeLocally(leg, request, source))

    def _bind(self, prefill: PrefillLeg, ticket: KVTicket, now_ms: float) -> None:
        """Choose D as late as the forecast allows, and at the latest with the first token."""
        source, need = prefill.info, self._need(now_ms)
        if need.max_new_tokens <= 1 and not prefill.is_held:
            return  # the first token is the last one
        decision = self._planner.pick_decode(need, source.worker_id)
        if isinstance(decision, Refusal):
            if not prefill.is_held:
                return  # P computes on; its progress asks again, at the latest its first token
            if decision.cause is Cause.NO_WORKER:
                self._decode_on_producer(prefill, now_ms)
            elif decision.cause is Cause.NEVER_FITS:
                self._drop_prefill()
                self._route(self._planner.plan(need), now_ms)
            else:
                self._wait(decision, now_ms)
            return
        left_ms = FORECAST_TRUST * prefill.left_ms - (now_ms - prefill.as_of_ms)
        early_ms = left_ms - decision.lead_ms
        if not prefill.is_held and early_ms > _TIMER_MS:
            self.wake_at_ms = min(self.wake_at_ms, now_ms + early_ms)
            return
        if decision.worker_id == source.worker_id:
            self._decode_on_producer(prefill, now_ms)
            return
        info = self._planner.info(decision.worker_id)
        leg = self._next_leg(info)
        self._decode = DecodeLeg(leg, info, Phase.BINDING, decision.num_bytes)
        self._timeline.decodes_on(info.worker_id)
        self._send(
            info,
            Bind(leg, self._request_now(now_ms), ticket, source.transports, source.host_id),
        )
        self._effects.append(
            TransferStarted(leg, source.worker_id, info.worker_id, decision.num_bytes)
        )

    def _decode_on_producer(self, prefill: PrefillLeg, now_ms: float) -> None:
        """No decode worker is up: P goes on by itself, from the prefix cache that it just filled.

        The lease goes at once, so that the new leg never waits for blocks which it pins itself.
        """
        if not prefill.is_held:
            return
        leg = self._next_leg(prefill.info)
        self._compute(leg, prefill.info, self._request_now(now_ms))
        self._drop_prefill()

    def _repair(self, decode: DecodeLeg, now_ms: float) -> None:
        """A fetch ended early. Fetch again, compute on D what is missing, or start elsewhere."""
        prefill, failed = self._prefill, decode.failed
        decode.failed = None
        ticket = None if prefill is None or prefill.is_void else prefill.ticket
        if (
            prefill is not None
            and ticket is not None
            and failed is not None
            and failed.cause in TRANSPORT_FAULTS
            and decode.num_rebinds < self._config.max_rebinds
        ):
            decode.num_rebinds += 1
            source = prefill.info
            self._send(decode.info, Rebind(decode.leg, ticket, source.transports, source.host_id))
            self._effects.append(
                TransferStarted(
                    decode.leg, source.worker_id, decode.info.worker_id, decode.num_bytes
                )
            )
            return
        if ticket is None:
            need = self._need(now_ms)
            num_valid = failed.valid_tokens if failed is not None else 0
            stay_ms = self._planner.local_ms(need, decode.info.worker_id, num_valid)
            decision = self._planner.plan(need)
            if (
                isinstance(decision, RouteDecision)
                and decision.remote
                and decision.predicted_ms < stay_ms
            ):
                # D's reservation goes first: nobody holds D's blocks while waiting for P's.
                self._send(decode.info, Abort(decode.leg))
                self._decode = None
                self._drop_prefill()
                self._route(decision, now_ms)
                return
        if prefill is not None and not prefill.is_held:
            self._drop_prefill()
        decode.phase = Phase.LOCAL
        self._send(decode.info, ComputeLocally(decode.leg, self._request_now(now_ms)))

    def _wait(self, refusal: Refusal, now_ms: float) -> None:
        """Only the gateway waits: for room, or, once something was computed, for a worker."""
        is_new = self._timeline.num_attempts == 0
        if refusal.cause is Cause.NEVER_FITS and not is_new:  # it did: that worker is gone
            refusal = Refusal(Cause.NO_WORKER, "no worker that is large enough is up")
        limit_ms = self._patience.wait_until_ms(refusal, now_ms)
        can_wait = refusal.cause is Cause.NO_ROOM or not is_new
        if not can_wait or now_ms >= limit_ms:
            self._end(refusal.cause, refusal.message)
            return
        self.is_parked = True
        retry_ms = self._patience.next_retry_ms(now_ms)
        self.wake_at_ms = min(self.wake_at_ms, limit_ms, retry_ms)

    # ── helpers ──────────────────────────────────────────────────────────────────────────────────

    def _end(self, cause: Cause | None, message: str) -> None:
        """Everything is let go: the decode leg unless it ended by itself, then the lease."""
        if self._decode is not None and not self._output.ended_by(self._decode.leg):
            self._send(self._decode.info, Abort(self._decode.leg))
        self._decode = None
        self._drop_prefill()
        self.wake_at_ms = float("inf")
        self.is_parked = False
        self.ended = Ended(cause, message)
        self._effects.append(self.ended)

    def _drop_prefill(self) -> None:
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            leg = prefill.leg
            self._send(prefill.info, Release(leg) if prefill.is_held else Abort(leg))

    def _send(self, info: WorkerInfo, message: GatewayMessage) -> None:
        self._effects.append(Send(info.worker_id, message))

    def _next_leg(self, info: WorkerInfo) -> LegId:
        self._fingerprint = info.fingerprint
        return LegId(self._request.request_id, self._timeline.next_attempt())

    def _need(self, now_ms: float) -> Need:
        avoid = self._patience.avoided(now_ms)
        return need_of(self._request, self._output, self._fingerprint, avoid)

    def _request_now(self, now_ms: float) -> Request:
        """The request as the next worker must know it: with everything committed so far."""
        return resumed(self._request, self._output, self.deadline_ms - now_ms)
