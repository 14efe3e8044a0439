"""Prefixes that legs of this worker fetch by hash from another, instead of computing them.

Submit or ComputeLocally with a PrefixSource
  ─► AddPrefill, AddLocal ─► PrefixReserved: fetch ─► ended, failed or late ─► PrefixArrived
                           └► LegAdmitted: nothing to fetch, it was here or is being computed

However the fetch ends, what is verified is kept and the rest is computed: no gateway is asked.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from baton.engine import commands
from baton.engine.events import PrefixReserved
from baton.errors import Cause
from baton.grants import HashChain
from baton.hashing import salt_digest
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import (
    CancelFetch,
    ComputeMissing,
    DropReservation,
    KeepVerified,
    QuiesceReservation,
    ReservationEffect,
)
from baton.kvtransfer.reservation import ReservationTable
from baton.messages import PrefixFetched, PrefixSource
from baton.types import HASH_TOKENS, KVRange, LegId, Request, TransferStats, WorkerInfo
from baton.worker.effects import FetchKV
from baton.worker.outbox import Outbox
from baton.worker.policy import WorkerPolicy

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Fetch:
    token_start: int
    valid_tokens: int
    is_late: bool = False


class PrefixFetches:
    """Owns the fetches and the reservations behind them; the legs are others'."""

    def __init__(self, info: WorkerInfo, policy: WorkerPolicy, outbox: Outbox) -> None:
        self._info = info
        self._outbox = outbox
        self._wanted: dict[LegId, tuple[PrefixSource, bytes]] = {}  # with the salt's digest
        self._fetches: dict[LegId, _Fetch] = {}
        self._results: dict[LegId, PrefixFetched] = {}
        self.reservations = ReservationTable(policy.decide_ms, policy.fetch_stall_ms)

    def __len__(self) -> int:
        return len(self.reservations)

    def __contains__(self, leg: LegId) -> bool:
        """Is something being fetched for it?"""
        return leg in self.reservations

    # ── of a leg ─────────────────────────────────────────────────────────────────────────────────

    def want(self, leg: LegId, request: Request, source: PrefixSource | None) -> int:
        """How many prompt tokens the engine may leave to us; 0 = it computes them."""
        if source is None:
            return 0
        grant = source.grant
        if (
            grant.consumer_incarnation != self._info.incarnation
            or grant.fingerprint != self._info.fingerprint
            or grant.num_tokens > len(request.prompt_token_ids)
        ):
            log.warning("%s comes with a grant that is not for it: computing", leg)
            return 0
        self._wanted[leg] = source, salt_digest(request.salt)
        return grant.num_tokens

    def result(self, leg: LegId) -> PrefixFetched | None:
        """How it ended, once: the leg goes on. None when there was nothing to fetch."""
        self._wanted.pop(leg, None)
        return self._results.pop(leg, None)

    def abort(self, leg: LegId) -> bool:
        """The leg is over. Whether a writer is still at its blocks; then Quiesced follows."""
        self._forget(leg)
        self._carry_out(self.reservations.abort(leg))
        return leg in self.reservations

    def failed(self, leg: LegId) -> bool:
        """The engine failed the leg. Whether Quiesced is our matter: a writer is at its blocks."""
        self._forget(leg)
        if leg not in self.reservations:
            return False
        self._carry_out(self.reservations.failed(leg))
        return True

    def _forget(self, leg: LegId) -> None:
        self._wanted.pop(leg, None)
        self._fetches.pop(leg, None)
        self._results.pop(leg, None)

    # ── from the engine ──────────────────────────────────────────────────────────────────────────

    def reserved(self, event: PrefixReserved, now_ms: int) -> None:
        leg, start, stop = event.leg, event.num_cached_tokens, event.num_fetch_tokens
        wanted = self._wanted.pop(leg, None)
        if wanted is None:
            return  # aborted meanwhile
        source, salt = wanted
        hashes = event.hashes[: source.grant.num_tokens // HASH_TOKENS]
        if not hashes or hashes[-1] != source.grant.last_hash:
            self._results[leg] = PrefixFetched(0, Cause.TOKENS_MISMATCH)
            self._outbox.post(commands.PrefixArrived(leg, start))
            return
        self._fetches[leg] = _Fetch(start, start)
        compute_by_ms = now_ms + source.deadline_ms if source.deadline_ms else None
        self.reservations.fetch_prefix(leg, event.block_ids, start, stop, compute_by_ms, now_ms)
        fetch = FetchOpen(
            source=HashChain(hashes, source.grant, self._info.incarnation),
            range=KVRange(0, self._info.layout.num_layers, start, stop),
            layout=self._info.layout,
            fingerprint=self._info.fingerprint,
            tokens_digest=source.grant.last_hash,
            salt_digest=salt,
            consumer=self._info.worker_id,
        )
        self._outbox.emit(FetchKV(leg, fetch, source.transports, source.host_id, event.block_ids))

    # ── from the fetch ───────────────────────────────────────────────────────────────────────────

    def fetch_ended(self, leg: LegId, stats: TransferStats, now_ms: int) -> None:
        """All that the source has is there."""
        fetch = self._fetches.get(leg)
        if fetch is not None:
            cause = None if stats.num_tokens else Cause.LEASE_UNKNOWN
            self._results[leg] = PrefixFetched(stats.num_tokens, cause, stats)
        valid_tokens = stats.num_tokens + (0 if fetch is None else fetch.token_start)
        self._ended(leg, valid_tokens, Cause.CANCELLED, now_ms)

    def fetch_failed(
        self, leg: LegId, valid_tokens: int, cause: Cause, detail: str, now_ms: int
    ) -> None:
        fetch = self._fetches.get(leg)
        if fetch is not None:
            why = Cause.DEADLINE_EXCEEDED if fetch.is_late else cause
            num_tokens = max(valid_tokens - fetch.token_start, 0)
            self._results[leg] = PrefixFetched(num_tokens, why)
            log.info("%s computes its prompt from token %d on: %s", leg, valid_tokens, detail)
        self._ended(leg, valid_tokens, cause, now_ms)

    def _ended(self, leg: LegId, valid_tokens: int, cause: Cause, now_ms: int) -> None:
        self._carry_out(self.reservations.fetch_failed(leg, valid_tokens, cause, "", now_ms))

    def tick(self, now_ms: int) -> None:
        late = self.reservations.tick(now_ms)
        for effect in late:
            assert isinstance(effect, CancelFetch), effect
            self._fetches[effect.leg].is_late = True
        self._carry_out(late)

    # ── effects ──────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, effects: Iterable[ReservationEffect]) -> None:
        for effect in effects:
            match effect:
                case KeepVerified(leg, valid_tokens):
                    self._fetches[leg].valid_tokens = valid_tokens
                case ComputeMissing(leg):
                    valid_tokens = self._fetches.pop(leg).valid_tokens
                    self._outbox.post(commands.PrefixArrived(leg, valid_tokens))
                case QuiesceReservation(leg):
                    self._outbox.post(commands.Quiesced(leg))
                case DropReservation():
                    pass  # whoever owns the leg drops it
                case CancelFetch():
                    self._outbox.emit(effect)
                case _:
                    raise AssertionError(effect)
