"""A running request changes its decode worker: what a `RequestMachine` needs beside its two legs.

    Submit to the worker it runs on    shares what is computed there: a lease, Admitted{ticket}
    Bind{ticket} to another worker     the *target*: fetches, recomputes less than a block
    its first token of every choice    the *source* is aborted, the lease released, and
    ComputeLocally to the target       brings it up to what the source has said meanwhile

With less than a block to share there is no lease: the target gets ComputeLocally instead of Bind.

Until the cut-over the source decodes on and its tokens are the client's; the target's are compared
with them. Whatever fails before it ends the migration and nothing else. When the source is lost
first, the target is what goes on; when the target is lost, the source is.
"""

from dataclasses import dataclass, field, replace

from baton.errors import Cause
from baton.gateway.backend import MigrationCause, MigrationResult
from baton.gateway.legs import (
    DecodeLeg,
    Effect,
    Emit,
    MachineConfig,
    Phase,
    Planner,
    PrefillLeg,
    TransferStarted,
)
from baton.gateway.request_machine import RequestMachine
from baton.gateway.router import Need, Refusal
from baton.messages import Abort, Bind, ComputeLocally, Imported, LegMessage, Release, Submit
from baton.types import LegId, Request, TokenChunk

_DECODES = (Phase.DECODING, Phase.LOCAL)


@dataclass(slots=True)
class _Migration:
    cause: MigrationCause
    lease: PrefillLeg | None = None  # on the source's worker
    target: DecodeLeg | None = None
    shares: bool = True  # False: the target computes all of it
    awaited: set[int] = field(default_factory=set)  # choices that the target has not taken up
    num_bytes: int = 0  # moved
    has_failed: bool = False

    def forget(self, leg: PrefillLeg | DecodeLeg) -> bool:
        """False when the leg is none of these."""
        if leg is self.lease:
            self.lease = None
        elif leg is self.target:
            self.target = None
        else:
            return False
        self.has_failed = True
        return True


class MigratingMachine(RequestMachine):
    """A request that can move while it runs. See the module docstring."""

    def __init__(
        self, request: Request, planner: Planner, config: MachineConfig, now_ms: float
    ) -> None:
        self._migration: _Migration | None = None
        self._unproven: LegId | None = None  # was bound while another leg decoded
        self._interrupted: MigrationCause | None = None
        self._stays_until_ms = now_ms
        super().__init__(request, planner, config, now_ms)

    # ── what policies see ────────────────────────────────────────────────────────────────────────

    @property
    def runs_on(self) -> str | None:
        """The worker that decodes it, if it can move from there: every choice has begun."""
        decode = self._decode
        if self.ended is not None or decode is None:
            return None
        has_begun = all(self._output.length(choice) for choice in self._output.open_choices)
        is_running = decode.phase in _DECODES
        return decode.info.worker_id if has_begun and is_running else None

    @property
    def is_migrating(self) -> bool:
        return self._migration is not None

    def may_migrate(self, now_ms: float) -> bool:
        """Not so soon after a migration that failed."""
        return self._migration is None and now_ms >= self._stays_until_ms

    def need(self, now_ms: float) -> Need:
        """What it needs wherever it goes on."""
        return self._need(now_ms)

    # ── events ───────────────────────────────────────────────────────────────────────────────────

    def migrate(self, cause: MigrationCause, now_ms: float) -> list[Effect]:
        """Begin to move; nothing when it cannot."""
        decode = self._decode
        if decode is not None and self.runs_on is not None and self.may_migrate(now_ms):
            source, request = decode.info, self._request_now(now_ms)
            if len(request.shared_token_ids) > source.layout.block_size:
                leg = self._next_leg(source)
                self._migration = _Migration(cause, PrefillLeg(leg, source, set()))
                self._send(source, Submit(leg, request))
            else:
                self._migration = _Migration(cause, shares=False)
        return self._settle(now_ms)

    def on_drain(self, worker_id: str, now_ms: float) -> list[Effect]:
        """The worker wants to end: it need not keep KV for a request that decodes elsewhere."""
        prefill, decode = self._prefill, self._decode
        is_done = decode is not None and decode.phase is Phase.DECODING
        if is_done and prefill is not None and prefill.info.worker_id == worker_id:
            self._drop_prefill()
        return self._settle(now_ms)

    def on_worker_lost(self, worker_id: str, now_ms: float) -> list[Effect]:
        if self._decode is not None and self._decode.info.worker_id == worker_id:
            self._interrupt(MigrationCause.FAILURE)
        migration = self._migration
        if migration is not None:
            target = migration.target
            if target is not None and target.info.worker_id == worker_id:
                self._patience.lost(target.info.incarnation)
                migration.forget(target)
            if migration.lease is not None and migration.lease.info.worker_id == worker_id:
                migration.forget(migration.lease)
        return super().on_worker_lost(worker_id, now_ms)

    def on_choice_finished(self, choice: int, now_ms: float) -> list[Effect]:
        target = None if self._migration is None else self._migration.target
        is_open = choice in self._output.open_choices
        if target is not None and is_open and len(self._output.open_choices) > 1:
            self._send(target.info, Abort(target.leg, choice))
        return super().on_choice_finished(choice, now_ms)

    def pass_on(self, message: LegMessage, now_ms: float) -> Emit | None:
        """The short way for what nearly all messages are: the next token of a request that decodes
        undisturbed, after which there is nothing to decide. None: `on_messages` has to see it."""
        decode = self._decode
        if (
            type(message) is TokenChunk
            and decode is not None
            and decode.phase in _DECODES
            and message.leg == decode.leg
            and self._migration is None
            and self._interrupted is None
            and self._timeline.is_decoding
            and now_ms < self.deadline_ms
            and self._output.append(message)
        ):
            return Emit(message)
        return None

    # ── legs ─────────────────────────────────────────────────────────────────────────────────────

    def _find(self, leg: LegId) -> PrefillLeg | DecodeLeg | None:
        migration = self._migration
        if migration is not None:
            for mine in (migration.lease, migration.target):
                if mine is not None and mine.leg == leg:
                    return mine
        return super()._find(leg)

    def _forget(self, leg: PrefillLeg | DecodeLeg) -> None:
        if self._migration is None or not self._migration.forget(leg):
            super()._forget(leg)

    def _leg_failed(
        self, leg: PrefillLeg | DecodeLeg, cause: Cause, detail: str, now_ms: float
    ) -> None:
        migration = self._migration
        if migration is not None and migration.forget(leg):
            self._patience.avoid(leg.info.worker_id, now_ms, self._config.retry_delay_ms)
            if cause is Cause.PROTOCOL:
                self._send(leg.info, Abort(leg.leg))
            return
        if leg is self._decode:
            draining = cause is Cause.DRAINING
            self._interrupt(MigrationCause.DRAIN if draining else MigrationCause.FAILURE)
        super()._leg_failed(leg, cause, detail, now_ms)

    def _on_decode(self, leg: DecodeLeg, message: LegMessage, now_ms: float) -> None:
        migration = self._migration
        if migration is not None and leg is migration.target and isinstance(message, Imported):
            migration.num_bytes = message.stats.num_bytes
        super()._on_decode(leg, message, now_ms)

    def _commit(self, leg: PrefillLeg | DecodeLeg, chunk: TokenChunk, now_ms: float) -> None:
        """A leg that another one was ahead of goes on only as long as both say the same."""
        migration = self._migration
        is_target = migration is not None and leg is migration.target
        if (is_target or leg.leg == self._unproven) and self._output.contradicts(chunk):
            self._output.num_defects += 1
            self._send(leg.info, Abort(leg.leg))
            self._leg_failed(leg, Cause.TOKENS_MISMATCH, "its tokens differ", now_ms)
            return
        super()._commit(leg, chunk, now_ms)
        if migration is not None and is_target:
            migration.awaited.discard(chunk.choice)

    # ── decisions ────────────────────────────────────────────────────────────────────────────────

    def _decide(self, now_ms: float) -> None:
        migration = self._migration
        if migration is not None:
            if self._decode is None:
                self._take_over(migration, now_ms)
            else:
                self._go_on(migration, now_ms)
        super()._decide(now_ms)
        self._note_resumption()

    def _go_on(self, migration: _Migration, now_ms: float) -> None:
        lease, target = migration.lease, migration.target
        is_cut = target is not None and target.failed is not None
        is_void = migration.shares and (lease is None or lease.is_void)
        if migration.has_failed or is_cut or is_void:
            self._stop(MigrationResult.FAILED, now_ms)
        elif target is None and (lease is None or lease.ticket is not None):
            self._begin_on_target(migration, now_ms)
        elif target is not None and not migration.awaited & set(self._output.open_choices):
            self._cut_over(target, now_ms)

    def _begin_on_target(self, migration: _Migration, now_ms: float) -> None:
        assert self._decode is not None
        source, need = self._decode.info, self._need(now_ms)
        elsewhere = replace(need, avoid=need.avoid | {source.worker_id})
        decision = self._planner.pick_decode(elsewhere, source.worker_id)
        if isinstance(decision, Refusal):
            self._stop(MigrationResult.FAILED, now_ms)
            return
        info = self._planner.info(decision.worker_id)
        leg, request = self._next_leg(info), self._request_now(now_ms)
        migration.awaited = set(self._output.open_choices)
        ticket = None if migration.lease is None else migration.lease.ticket
        if ticket is None:
            migration.target = DecodeLeg(leg, info, Phase.LOCAL)
            self._send(info, ComputeLocally(leg, request))
            return
        num_tokens = max(ticket.num_tokens - decision.num_cached_tokens, 0)
        num_bytes = num_tokens * source.layout.token_bytes
        migration.target = DecodeLeg(leg, info, Phase.BINDING, num_bytes)
        self._send(info, Bind(leg, request, ticket, source.transports, source.host_id))
        self._effects.append(TransferStarted(leg, source.worker_id, info.worker_id, num_bytes))

    def _cut_over(self, target: DecodeLeg, now_ms: float) -> None:
        source = self._decode
        assert source is not None
        self._send(source.info, Abort(source.leg))
        self._become(target, now_ms)

    def _become(self, target: DecodeLeg, now_ms: float) -> None:
        """The target decodes; what it was not there to see it is told."""
        migration = self._migration
        assert migration is not None
        self._decode, migration.target = target, None
        self._unproven = target.leg
        self._interrupted = None
        target.phase = Phase.DECODING
        self._timeline.decodes_on(target.info.worker_id)
        self._send(target.info, ComputeLocally(target.leg, self._request_now(now_ms)))
        self._stop(MigrationResult.MOVED, now_ms)

    def _take_over(self, migration: _Migration, now_ms: float) -> None:
        """The source is gone. What has been prepared is the best there is, if it is still alive."""
        lease, target = migration.lease, migration.target
        if target is not None and target.phase is Phase.DECODING:
            self._become(target, now_ms)
            return
        if target is not None:
            self._unproven = target.leg  # the source may have been ahead of what it knows
        if lease is not None and lease.ticket is not None and not lease.is_void:
            self._drop_prefill()
            self._prefill, migration.lease = lease, None
            self._decode, migration.target = target, None  # goes on with its fetch, or is to come
        elif target is not None and (target.phase is Phase.LOCAL or self._prefill is None):
            self._decode, migration.target = target, None  # computes what it could not fetch
        self._stop(None, now_ms)

    def _stop(self, result: MigrationResult | None, now_ms: float) -> None:
        """Let go of what the migration still holds. No result: it is told by what comes next."""
        migration, self._migration = self._migration, None
        assert migration is not None
        if migration.target is not None:
            self._send(migration.target.info, Abort(migration.target.leg))
        if migration.lease is not None:
            lease = migration.lease
            self._send(lease.info, Release(lease.leg) if lease.ticket else Abort(lease.leg))
        if result is not None:
            self._timeline.migrated(migration.cause, result, migration.num_bytes)
        self._stays_until_ms = now_ms + self._config.retry_delay_ms

    def _end(self, cause: Cause | None, message: str) -> None:
        if self._migration is not None:
            self._stop(MigrationResult.MOOT, self._stays_until_ms)
        super()._end(cause, message)

    # ── after a loss ─────────────────────────────────────────────────────────────────────────────

    def _interrupt(self, cause: MigrationCause) -> None:
        if self.runs_on is not None:
            self._interrupted = cause

    def _note_resumption(self) -> None:
        """How it went on after it had lost its decode worker."""
        decode, prefill = self._decode, self._prefill
        if self._interrupted is None or (decode is None and prefill is None):
            return
        if decode is None and prefill is not None and prefill.is_held:
            return  # is going to be bound
        has_kv = decode is not None and decode.phase is not Phase.LOCAL
        result = MigrationResult.ATTACHED if has_kv else MigrationResult.RECOMPUTED
        self._timeline.migrated(self._interrupted, result, 0)
        self._interrupted = None
