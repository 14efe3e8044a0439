"""Reservations: blocks on the decoding worker that wait for a prompt's KV.

A pure state machine like `baton.kvtransfer.lease`, drawn in docs/kv-exchange.md.

    RESERVING   the engine looks for room
    FETCHING    a writer fills the blocks
    FAILED      the writer has stopped early; the gateway decides
    CLOSING     over; the blocks are in quarantine until the writer has stopped

A reservation leaves the table when its KV is complete (ImportKV), when the engine computes the rest
(ComputeMissing), or when it is dropped and nothing writes any more. Abort is legal in every state.
A decision may come before it is asked for: a gateway that sees the producer die need not wait for
the consumer to notice.
"""

from dataclasses import dataclass
from enum import Enum

from baton.errors import Cause
from baton.kvtransfer.effects import (
    AskDecision,
    CancelFetch,
    ComputeMissing,
    DropReservation,
    ImportKV,
    KeepVerified,
    KVSource,
    QuiesceReservation,
    ReservationEffect,
    ReservationEnded,
    StartFetch,
)
from baton.types import BlockId, LegId


class ReservationState(Enum):
    RESERVING = "reserving"
    FETCHING = "fetching"
    FAILED = "failed"
    CLOSING = "closing"


class _Decision(Enum):
    """What to do when the present fetch has ended."""

    ASK = "ask"
    FETCH = "fetch"  # again, from `source`
    COMPUTE = "compute"


@dataclass(slots=True)
class _Reservation:
    leg: LegId
    source: KVSource | None  # None: a prefix by hash, which is never fetched again
    state: ReservationState = ReservationState.RESERVING
    block_ids: tuple[BlockId, ...] = ()  # from the engine's answer on
    num_tokens: int = 0
    valid_tokens: int = 0  # own prefix hit and what was verified since
    decision: _Decision = _Decision.ASK
    decide_by_ms: int = 0  # while FAILED
    progress_at_ms: int = 0  # while FETCHING
    compute_by_ms: int | None = None  # while FETCHING a prefix
    is_stalled: bool = False


class ReservationTable:
    """All reservations of one worker. See the module docstring."""

    def __init__(self, decide_ms: int, stall_ms: int) -> None:
        """
        Args:
            decide_ms: how long a failed reservation waits for the gateway's decision.
            stall_ms: how long a fetch may bring nothing. Generous, because a producer that is
                still computing sends nothing either; it cuts stalled consumers much sooner.
        """
        self._decide_ms = decide_ms
        self._stall_ms = stall_ms
        self._reservations: dict[LegId, _Reservation] = {}

    def __len__(self) -> int:
        return len(self._reservations)

    def __contains__(self, leg: LegId) -> bool:
        return leg in self._reservations

    def state(self, leg: LegId) -> ReservationState | None:
        reservation = self._reservations.get(leg)
        return None if reservation is None else reservation.state

    def num_tokens(self, leg: LegId) -> int:
        """How many are fetched, its own prefix hit included; 0 before that is known."""
        reservation = self._reservations.get(leg)
        return 0 if reservation is None else reservation.num_tokens

    # ── from the gateway ─────────────────────────────────────────────────────────────────────────

    def reserve(self, leg: LegId, source: KVSource) -> None:
        """Bind was accepted; the engine has been asked."""
        assert leg not in self._reservations
        self._reservations[leg] = _Reservation(leg, source)

    def rebind(self, leg: LegId, source: KVSource, now_ms: int) -> list[ReservationEffect]:
        """Fetch what is missing from `source`."""
        reservation = self._reservations.get(leg)
        if reservation is None or reservation.state is ReservationState.CLOSING:
            return []
        reservation.source = source
        return self._decide(reservation, _Decision.FETCH, now_ms)

    def compute(self, leg: LegId, now_ms: int) -> list[ReservationEffect]:
        """Fetch no more; compute what is missing here."""
        reservation = self._reservations.get(leg)
        if reservation is None or reservation.state is ReservationState.CLOSING:
            return []
        return self._decide(reservation, _Decision.COMPUTE, now_ms)

    def abort(self, leg: LegId) -> list[ReservationEffect]:
        """The request is over, or its session is lost."""
        reservation = self._reservations.get(leg)
        if reservation is None or reservation.state is ReservationState.CLOSING:
            return []
        if reservation.state is ReservationState.FETCHING:
            reservation.state = ReservationState.CLOSING
            return [CancelFetch(leg), DropReservation(leg, in_flight=True)]
        del self._reservations[leg]
        return [DropReservation(leg, in_flight=False)]

    def fetch_prefix(
        self,
        leg: LegId,
        block_ids: tuple[BlockId, ...],
        token_start: int,
        token_stop: int,
        compute_by_ms: int | None,
        now_ms: int,
    ) -> None:
        """The caller fetches prompt tokens [token_start, token_stop) by hash into blocks that the
        engine has reserved. It is decided what comes next: compute what is missing, at
        `compute_by_ms` in any case. However it ends, report `fetch_failed`."""
        assert leg not in self._reservations
        self._reservations[leg] = _Reservation(
            leg,
            None,
            ReservationState.FETCHING,
            block_ids,
            num_tokens=token_stop,
            valid_tokens=token_start,
            decision=_Decision.COMPUTE,
            progress_at_ms=now_ms,
            compute_by_ms=compute_by_ms,
        )

    # ── from the engine ──────────────────────────────────────────────────────────────────────────

    def reserved(
        self,
        leg: LegId,
        block_ids: tuple[BlockId, ...],
        num_tokens: int,
        num_cached_tokens: int,
        now_ms: int,
    ) -> list[ReservationEffect]:
        """Blocks are reserved; the first `num_cached_tokens` tokens are this worker's own."""
        reservation = self._reservations.get(leg)
        if reservation is None or reservation.state is not ReservationState.RESERVING:
            return []
        reservation.block_ids = block_ids
        reservation.num_tokens = num_tokens
        reservation.valid_tokens = num_cached_tokens
        if reservation.decision is _Decision.COMPUTE:
            return self._compute(reservation)
        return self._fetch(reservation, now_ms)

    def refused(self, leg: LegId) -> None:
        """The engine has no room; nothing is held."""
        if self.state(leg) is ReservationState.RESERVING:
            del self._reservations[leg]

    def failed(self, leg: LegId) -> list[ReservationEffect]:
        """The engine failed the leg; its blocks wait in quarantine for QuiesceReservation."""
        reservation = self._reservations.get(leg)
        if reservation is None:
            return [QuiesceReservation(leg)]
        if reservation.state is ReservationState.CLOSING:
            return []  # comes when the writer has stopped
        if reservation.state is ReservationState.FETCHING:
            reservation.state = ReservationState.CLOSING
            return [CancelFetch(leg)]
        return self._quiesce(reservation)

    # ── from the fetch ───────────────────────────────────────────────────────────────────────────

    def progress(self, leg: LegId, now_ms: int) -> None:
        """A frame was verified and written."""
        reservation = self._reservations.get(leg)
        if reservation is not None:
            reservation.progress_at_ms = now_ms

    def fetch_ended(self, leg: LegId) -> list[ReservationEffect]:
        """Everything arrived and verified; nothing writes any more. A decision that came too late
        is moot."""
        reservation = self._reservations.get(leg)
        if reservation is None:
            return []
        if reservation.state is ReservationState.CLOSING:
            return self._quiesce(reservation)
        assert reservation.state is ReservationState.FETCHING, reservation.state
        del self._reservations[leg]
        return [ImportKV(leg)]

    def fetch_failed(
        self, leg: LegId, valid_tokens: int, cause: Cause, detail: str, now_ms: int
    ) -> list[ReservationEffect]:
        """The fetch ended early; prompt tokens [0, valid_tokens) are verified; nothing writes any
        more."""
        reservation = self._reservations.get(leg)
        if reservation is None:
            return []
        if reservation.state is ReservationState.CLOSING:
            return self._quiesce(reservation)
        assert reservation.state is ReservationState.FETCHING, reservation.state
        valid_tokens = min(max(valid_tokens, reservation.valid_tokens), reservation.num_tokens)
        reservation.valid_tokens = valid_tokens
        effects: list[ReservationEffect] = [KeepVerified(leg, valid_tokens)]
        if reservation.decision is _Decision.FETCH:
            return [*effects, *self._fetch(reservation, now_ms)]
        if reservation.decision is _Decision.COMPUTE:
            return [*effects, *self._compute(reservation)]
        if reservation.is_stalled:
            cause, detail = Cause.TRANSFER_STALLED, "no frame came in time"
        reservation.state = ReservationState.FAILED
        reservation.decide_by_ms = now_ms + self._decide_ms
        return [*effects, AskDecision(leg, valid_tokens, cause, detail)]

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now_ms: int) -> list[ReservationEffect]:
        """Cancel fetches that bring nothing; drop reservations that nobody decides."""
        effects: list[ReservationEffect] = []
        for r in list(self._reservations.values()):
            if r.state is ReservationState.FETCHING and not r.is_stalled:
                late = r.compute_by_ms is not None and r.compute_by_ms <= now_ms
                r.is_stalled = late or now_ms - r.progress_at_ms > self._stall_ms
                if r.is_stalled:
                    effects.append(CancelFetch(r.leg))
            if r.state is ReservationState.FAILED and r.decide_by_ms <= now_ms:
                effects += self.abort(r.leg)
                effects.append(_undecided(r.leg))
        return effects

    # ── transitions ──────────────────────────────────────────────────────────────────────────────

    def _decide(
        self, reservation: _Reservation, decision: _Decision, now_ms: int
    ) -> list[ReservationEffect]:
        if reservation.state is ReservationState.FAILED:
            if decision is _Decision.COMPUTE:
                return self._compute(reservation)
            return self._fetch(reservation, now_ms)
        was_asking = reservation.decision is _Decision.ASK
        reservation.decision = decision
        fetching = reservation.state is ReservationState.FETCHING
        return [CancelFetch(reservation.leg)] if fetching and was_asking else []

    def _fetch(self, reservation: _Reservation, now_ms: int) -> list[ReservationEffect]:
        assert reservation.source is not None, "a prefix is fetched once"
        reservation.state = ReservationState.FETCHING
        reservation.decision = _Decision.ASK
        reservation.progress_at_ms = now_ms
        reservation.is_stalled = False
        return [
            StartFetch(
                reservation.leg,
                reservation.source,
                reservation.valid_tokens,
                reservation.num_tokens,
                reservation.block_ids,
            )
        ]

    def _compute(self, reservation: _Reservation) -> list[ReservationEffect]:
        del self._reservations[reservation.leg]
        return [ComputeMissing(reservation.leg)]

    def _quiesce(self, reservation: _Reservation) -> list[ReservationEffect]:
        del self._reservations[reservation.leg]
        return [QuiesceReservation(reservation.leg)]

    def check_integrity(self) -> None:
        """Asserts every invariant; for tests and idle workers."""
        for leg, reservation in self._reservations.items():
            assert reservation.leg == leg
            assert 0 <= reservation.valid_tokens <= reservation.num_tokens
            if reservation.state is ReservationState.RESERVING:
                assert not reservation.block_ids
            if reservation.state is ReservationState.FAILED:
                assert reservation.decision is _Decision.ASK


def _undecided(leg: LegId) -> ReservationEnded:
    return ReservationEnded(leg, Cause.DEADLINE_EXCEEDED, "the gateway did not decide")
