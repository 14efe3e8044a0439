"""The prefill side of a worker: legs that compute a prompt and hold its KV for others to fetch.

Submit ─► AddPrefill ─► LegAdmitted: a lease and its ticket ─► … ─► first tokens
Submit of what runs here ─► Share ─► LegAdmitted: a lease and its ticket, everything ready
the lease lives on until Release, Abort, a lost session, expiry or eviction
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from baton.engine import commands
from baton.engine.events import (
    LeaseEvicted,
    LegAdmitted,
    LegEvent,
    LegFailed,
    LegPinned,
    LegRefused,
    LegTokens,
    PrefillProgress,
)
from baton.errors import BatonError, Cause
from baton.hashing import salt_digest, tokens_digest
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import (
    AttachRefused,
    DropLease,
    LeaseEffect,
    LeaseEnded,
    PinLease,
    QuiesceLease,
    RetainLease,
)
from baton.kvtransfer.lease import LeaseTable
from baton.kvtransfer.ticket import TicketKeyring, check_fetch
from baton.messages import Admitted, Failed, LeaseLost, NoRoom, Progress, Submit
from baton.types import KVRange, KVTicket, LegId, Request, TokenChunk, WorkerInfo
from baton.worker.effects import SessionId
from baton.worker.leg_table import LegOwner
from baton.worker.outbox import Outbox
from baton.worker.policy import PrefillPredictor, WorkerPolicy
from baton.worker.prefix_fetches import PrefixFetches

MAX_RETRY_AFTER_MS = 1_000


@dataclass(slots=True)
class _PrefillLeg:
    session: SessionId
    request: Request
    awaited: set[int]  # choices whose first token is to come
    deadline_at_ms: int | None
    num_done_tokens: int = 0  # in arrival order these make the queue that predictions see
    first_tokens: dict[int, TokenChunk] = field(default_factory=dict)

    @property
    def num_left_tokens(self) -> int:
        return len(self.request.prompt_token_ids) - self.num_done_tokens

    @property
    def is_sampled(self) -> bool:
        return not self.awaited


class ProducerSide(LegOwner[_PrefillLeg]):
    """Owns the prefill legs and the lease table of one worker."""

    def __init__(
        self,
        info: WorkerInfo,
        policy: WorkerPolicy,
        keyring: TicketKeyring,
        predictor: PrefillPredictor,
        outbox: Outbox,
        prefixes: PrefixFetches,
        first_epoch: int,
        random_id: Callable[[], bytes],
    ) -> None:
        super().__init__()
        self._info = info
        self._policy = policy
        self._keyring = keyring
        self._predictor = predictor
        self._outbox = outbox
        self._prefixes = prefixes
        self._random_id = random_id
        self.leases = LeaseTable(first_epoch, policy.attachment_stall_ms, policy.lease_idle_ms)
        self.refusals: Counter[Cause] = Counter()  # since the start, for metrics

    # ── from the gateway ─────────────────────────────────────────────────────────────────────────

    def submit(self, session: SessionId, message: Submit, free_blocks: int, now_ms: int) -> bool:
        """False when it was refused for now; then nothing is held."""
        leg, request = message.leg, message.request
        if self._is_above_watermark(request):
            self._outbox.tell(session, NoRoom(leg, free_blocks, self._retry_after_ms()))
            return False
        deadline = None if request.deadline_ms is None else now_ms + request.deadline_ms
        self._legs[leg] = _PrefillLeg(session, request, set(request.open_choices()), deadline)
        num_fetch_tokens = self._prefixes.want(leg, message.request, message.prefix)
        self._outbox.post(commands.AddPrefill(leg, request, num_fetch_tokens))
        return True

    def share(
        self, session: SessionId, leg: LegId, request: Request, source: LegId, now_ms: int
    ) -> None:
        """Hold what `source`, a leg of the same request that runs here, has computed: another
        worker is going to take it over. Pins nothing that would be free without it."""
        deadline = None if request.deadline_ms is None else now_ms + request.deadline_ms
        self._legs[leg] = _PrefillLeg(session, request, set(), deadline)
        self._outbox.post(commands.Share(leg, request, source))

    def _is_above_watermark(self, request: Request) -> bool:
        """Leased blocks stay until a gateway says so; keep room for what is computed here."""
        num_leased = self.leases.num_pinned_blocks
        num_blocks = -(-len(request.prompt_token_ids) // self._info.layout.block_size)
        watermark = self._policy.lease_watermark * self._info.num_blocks
        return num_leased > 0 and num_leased + num_blocks > watermark

    def _retry_after_ms(self) -> int:
        queued_ms = self._predictor.prefill_ms(sum(x.num_left_tokens for x in self._legs.values()))
        return int(min(max(queued_ms, self._policy.retry_after_ms), MAX_RETRY_AFTER_MS))

    def abort(self, leg: LegId) -> None:
        """Release and Abort alike: the leg is over, whatever it was doing."""
        record = self._legs.get(leg)
        if record is None:
            return
        if leg in self.leases:
            self._carry_out(self.leases.release(leg))
        else:
            self._outbox.post(commands.Abort(leg, in_flight=self._prefixes.abort(leg)))
        del self._legs[leg]

    def abort_choice(self, leg: LegId, choice: int, now_ms: int) -> None:
        record = self._legs.get(leg)
        if record is None or choice not in record.awaited:
            return
        if len(record.awaited) == 1 and not record.first_tokens:
            self.abort(leg)
            return
        record.awaited.discard(choice)
        self._outbox.post(commands.Abort(leg, choice))
        self._sampled(leg, record, now_ms)

    # ── from the engine ──────────────────────────────────────────────────────────────────────────

    def on_event(self, event: LegEvent, now_ms: int) -> None:
        match event:
            case LegTokens(chunk):
                self._on_tokens(chunk, now_ms)
            case PrefillProgress(leg, num_done_tokens):
                self._on_progress(leg, num_done_tokens, now_ms)
            case LegAdmitted():
                self._on_admitted(event, now_ms)
            case LegRefused(leg, free_blocks):
                self._on_refused(leg, free_blocks)
            case LegFailed(leg, cause, detail):
                self._on_failed(leg, cause, detail)
            case LegPinned(leg):
                self._carry_out(self.leases.pinned(leg, now_ms))
            case LeaseEvicted(leg):
                self._carry_out(self.leases.evicted(leg))
            case _:
                pass  # KVReserved and LegPreempted are never about a prefill

    def _on_admitted(self, event: LegAdmitted, now_ms: int) -> None:
        record = self._legs.get(event.leg)
        if record is None:
            return
        record.num_done_tokens = event.num_cached_tokens
        ticket = self._mint(record.request, event.num_tokens, now_ms)
        self.leases.open(event.leg, ticket, event.block_ids, event.num_cached_tokens)
        prefix = self._prefixes.result(event.leg)
        self._outbox.tell(
            record.session, Admitted(event.leg, event.num_cached_tokens, ticket, prefix)
        )
        self._sampled(event.leg, record, now_ms)  # a shared one: nothing is to be sampled

    def _mint(self, request: Request, num_tokens: int, now_ms: int) -> KVTicket:
        info = self._info
        unsigned = KVTicket(
            transfer_id=self._random_id(),
            address=info.address,
            incarnation=info.incarnation,
            fingerprint=info.fingerprint,
            layout=info.layout,
            num_tokens=num_tokens,
            tokens_digest=tokens_digest(request.shared_token_ids[:num_tokens]),
            salt_digest=salt_digest(request.salt),
            expires_at_ms=now_ms + self._policy.lease_ttl_ms,
            key_id=0,
        )
        return self._keyring.mint(unsigned)

    def _on_progress(self, leg: LegId, num_done_tokens: int, now_ms: int) -> None:
        record = self._legs.get(leg)
        if record is None:
            return
        record.num_done_tokens = num_done_tokens
        self._outbox.tell(
            record.session, Progress(leg, num_done_tokens, self._predicted_ms_left(leg))
        )
        self._carry_out(self.leases.ready(leg, num_done_tokens, now_ms))

    def layers_ready(self, leg: LegId, where: KVRange, now_ms: int) -> None:
        """Within a step: for readers only, a gateway counts in whole tokens."""
        self._carry_out(self.leases.layers_ready(leg, where, now_ms))

    def _predicted_ms_left(self, leg: LegId) -> float:
        """Of this leg and of those that came before it, which the scheduler serves first."""
        total_ms = 0.0
        for other, record in self._legs.items():
            if record.num_left_tokens > 0:
                total_ms += self._predictor.prefill_ms(
                    record.num_left_tokens, record.num_done_tokens
                )
            if other == leg:
                break
        return total_ms

    def _on_tokens(self, chunk: TokenChunk, now_ms: int) -> None:
        record = self._legs.get(chunk.leg)
        if record is None:
            return
        self._outbox.tell(record.session, chunk)
        if chunk.start == 0:
            record.first_tokens[chunk.choice] = chunk
            record.awaited.discard(chunk.choice)
            self._sampled(chunk.leg, record, now_ms)

    def _sampled(self, leg: LegId, record: _PrefillLeg, now_ms: int) -> None:
        if record.is_sampled:
            first_tokens = tuple(record.first_tokens[c] for c in sorted(record.first_tokens))
            self._carry_out(self.leases.sampled(leg, first_tokens, now_ms))

    def _on_refused(self, leg: LegId, free_blocks: int) -> None:
        record = self._legs.pop(leg, None)
        if record is not None:
            self._outbox.tell(record.session, NoRoom(leg, free_blocks, self._retry_after_ms()))

    def _on_failed(self, leg: LegId, cause: Cause, detail: str) -> None:
        """Also of a leg that was aborted meanwhile: the engine waits for QuiesceLease."""
        record = self._legs.pop(leg, None)
        if record is not None:
            self._outbox.tell(record.session, Failed(leg, cause, detail))
        if not self._prefixes.failed(leg):
            self._carry_out(self.leases.failed(leg))

    # ── from consumers ───────────────────────────────────────────────────────────────────────────

    def attach(self, key: int, fetch: FetchOpen, now_ms: int) -> None:
        """Answered by AttachGranted or AttachRefused with the same `key`, now or later."""
        assert isinstance(fetch.source, KVTicket), "by hash: PrefixPins"
        ticket = fetch.source
        try:
            self._keyring.verify(ticket, self._info.incarnation, now_ms)
            check_fetch(fetch, ticket)
        except BatonError as error:
            self._carry_out([AttachRefused(key, error.cause, error.message)])
            return
        start = fetch.range.token_start
        effects = self.leases.attach(key, ticket.transfer_id, start, now_ms, fetch.pace_ms)
        self._carry_out(effects)

    def attachment_closed(self, epoch: int, now_ms: int) -> None:
        self._carry_out(self.leases.closed(epoch, now_ms))

    def tick(self, now_ms: int) -> None:
        self._carry_out(self.leases.tick(now_ms))

    # ── effects ──────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, effects: Iterable[LeaseEffect]) -> None:
        for effect in effects:
            match effect:
                case RetainLease(leg):
                    self._outbox.post(commands.Retain(leg))
                case PinLease(leg):
                    self._outbox.post(commands.Pin(leg))
                case DropLease(leg, in_flight):
                    end = commands.Release if self._legs[leg].is_sampled else commands.Abort
                    self._outbox.post(end(leg, in_flight=in_flight))
                case QuiesceLease(leg):
                    self._outbox.post(commands.Quiesced(leg))
                case LeaseEnded(leg, cause):
                    self._lease_ended(leg, cause)
                case AttachRefused(_, cause):
                    self.refusals[cause] += 1
                    self._outbox.emit(effect)
                case _:
                    self._outbox.emit(effect)

    def _lease_ended(self, leg: LegId, cause: Cause) -> None:
        record = self._legs.pop(leg, None)
        if record is not None:
            self._outbox.tell(record.session, LeaseLost(leg, cause))

    def check_integrity(self) -> None:
        """Asserts every invariant; for tests and idle workers."""
        self.leases.check_integrity()
        for record in self._legs.values():
            assert record.awaited.isdisjoint(record.first_tokens)
