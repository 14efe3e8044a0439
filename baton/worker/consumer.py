"""The decode side of a worker: legs that fetch a prompt's KV, or compute it here, and decode.

Bind ─► AddDecode ─► KVReserved: Bound, fetch ─► Imported ─► tokens … ─► every choice finished
                                   │ ended early: KvFailed; Rebind, ComputeLocally or Abort
ComputeLocally ─► AddLocal ─► tokens … ─► every choice finished
"""

from collections.abc import Iterable
from dataclasses import dataclass

from baton.engine import commands
from baton.engine.events import (
    KVReserved,
    LegAdmitted,
    LegEvent,
    LegFailed,
    LegRefused,
    LegTokens,
    PrefillProgress,
)
from baton.errors import BatonError, Cause
from baton.hashing import salt_digest
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import (
    AskDecision,
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
from baton.kvtransfer.reservation import ReservationTable
from baton.kvtransfer.ticket import check_ticket
from baton.messages import (
    Admitted,
    Bound,
    ComputeLocally,
    Failed,
    Imported,
    KvFailed,
    NoRoom,
    Progress,
)
from baton.types import (
    KVRange,
    KVTicket,
    LegId,
    Request,
    TokenChunk,
    TransferStats,
    WorkerInfo,
)
from baton.worker.effects import FetchKV, SessionId
from baton.worker.leg_table import LegOwner
from baton.worker.outbox import Outbox
from baton.worker.policy import PrefillPredictor, WorkerPolicy
from baton.worker.prefix_fetches import PrefixFetches


@dataclass(slots=True)
class _DecodeLeg:
    session: SessionId
    request: Request
    open_choices: set[int]
    deadline_at_ms: int | None


class ConsumerSide(LegOwner[_DecodeLeg]):
    """Owns the decode legs, local ones included, and the reservation table of one worker."""

    def __init__(
        self,
        info: WorkerInfo,
        policy: WorkerPolicy,
        predictor: PrefillPredictor,
        outbox: Outbox,
        prefixes: PrefixFetches,
    ) -> None:
        super().__init__()
        self._info = info
        self._policy = policy
        self._predictor = predictor
        self._outbox = outbox
        self._prefixes = prefixes
        self.reservations = ReservationTable(policy.decide_ms, policy.fetch_stall_ms)

    # ── from the gateway ─────────────────────────────────────────────────────────────────────────

    def bind(
        self, session: SessionId, leg: LegId, request: Request, source: KVSource, now_ms: int
    ) -> None:
        """
        Raises:
            BatonError: the ticket is not for this request, or its KV cannot be used here. Nothing
                is held then.
        """
        self._check_ticket(source.ticket, request)
        self._open(session, leg, request, now_ms)
        self.reservations.reserve(leg, source)
        self._outbox.post(commands.AddDecode(leg, request, source.ticket.num_tokens))

    def rebind(self, leg: LegId, source: KVSource, now_ms: int) -> None:
        """
        Raises:
            BatonError: as for `bind`. The leg goes on waiting for a decision.
        """
        self._check_ticket(source.ticket, self._legs[leg].request)
        self._carry_out(self.reservations.rebind(leg, source, now_ms))

    def _check_ticket(self, ticket: KVTicket, request: Request) -> None:
        check_ticket(ticket, request, self._info.fingerprint, self._info.layout)

    def compute_locally(self, session: SessionId, message: ComputeLocally, now_ms: int) -> None:
        """For a known leg: fetch no more. If it runs already, go on behind what is committed."""
        leg, request = message.leg, message.request
        if leg in self.reservations:
            self._carry_out(self.reservations.compute(leg, now_ms))
            return
        if leg in self._legs:
            self._advance(leg, request)
            return
        self._open(session, leg, request, now_ms)
        num_fetch_tokens = self._prefixes.want(leg, request, message.prefix)
        self._outbox.post(commands.AddLocal(leg, request, num_fetch_tokens))

    def _advance(self, leg: LegId, request: Request) -> None:
        for choice in request.finished_choices:
            self.abort_choice(leg, choice)
        # Whoever waits for a prefix has told nothing yet: it computes what others have told, too.
        if leg in self._legs and leg not in self._prefixes and request.output_token_ids:
            self._outbox.post(commands.Advance(leg, request.output_token_ids))

    def running(self, session: SessionId, request_id: str) -> LegId | None:
        """The session's leg of this request that has all its KV, if there is one."""
        return next(
            (
                leg
                for leg, record in self._legs.items()
                if leg.request_id == request_id
                and record.session == session
                and leg not in self.reservations
                and leg not in self._prefixes
            ),
            None,
        )

    def _open(self, session: SessionId, leg: LegId, request: Request, now_ms: int) -> None:
        deadline = None if request.deadline_ms is None else now_ms + request.deadline_ms
        self._legs[leg] = _DecodeLeg(session, request, set(request.open_choices()), deadline)

    def abort(self, leg: LegId) -> None:
        if self._legs.pop(leg, None) is None:
            return
        if leg in self.reservations:
            self._carry_out(self.reservations.abort(leg))
        else:
            self._outbox.post(commands.Abort(leg, in_flight=self._prefixes.abort(leg)))

    def abort_choice(self, leg: LegId, choice: int) -> None:
        """The last open choice takes the leg with it: only this side knows of a fetch under way."""
        record = self._legs.get(leg)
        if record is None or choice not in record.open_choices:
            return
        if len(record.open_choices) == 1:
            self.abort(leg)
            return
        record.open_choices.discard(choice)
        self._outbox.post(commands.Abort(leg, choice))

    # ── from the engine ──────────────────────────────────────────────────────────────────────────

    def on_event(self, event: LegEvent, now_ms: int) -> None:
        match event:
            case LegTokens(chunk):
                self._on_tokens(chunk)
            case PrefillProgress(leg, num_done_tokens):
                self._on_progress(leg, num_done_tokens)
            case LegAdmitted():
                self._on_admitted(event)
            case KVReserved():
                self._on_reserved(event, now_ms)
            case LegRefused(leg, free_blocks):
                self._on_refused(leg, free_blocks)
            case LegFailed(leg, cause, detail):
                self._on_failed(leg, cause, detail)
            case _:
                pass  # LegPreempted goes on by itself; the rest is about leases that are gone

    def _on_admitted(self, event: LegAdmitted) -> None:
        record = self._legs.get(event.leg)
        if record is not None:
            prefix = self._prefixes.result(event.leg)
            admitted = Admitted(event.leg, event.num_cached_tokens, prefix=prefix)
            self._outbox.tell(record.session, admitted)

    def _on_progress(self, leg: LegId, num_done_tokens: int) -> None:
        record = self._legs.get(leg)
        if record is not None:
            num_left = len(record.request.prompt_token_ids) - num_done_tokens
            left_ms = self._predictor.prefill_ms(num_left, num_done_tokens)
            self._outbox.tell(record.session, Progress(leg, num_done_tokens, left_ms))

    def _on_reserved(self, event: KVReserved, now_ms: int) -> None:
        record = self._legs.get(event.leg)
        if record is None:
            return
        self._outbox.tell(record.session, Bound(event.leg, event.num_cached_tokens))
        self._carry_out(
            self.reservations.reserved(
                event.leg,
                event.block_ids,
                event.num_tokens,
                event.num_cached_tokens,
                now_ms,
            )
        )

    def _on_tokens(self, chunk: TokenChunk) -> None:
        record = self._legs.get(chunk.leg)
        if record is None:
            return
        self._outbox.tell(record.session, chunk)
        if chunk.finish_reason is not None:
            record.open_choices.discard(chunk.choice)
            if not record.open_choices:
                del self._legs[chunk.leg]  # the engine has freed what it held

    def _on_refused(self, leg: LegId, free_blocks: int) -> None:
        self.reservations.refused(leg)
        record = self._legs.pop(leg, None)
        if record is not None:
            self._outbox.tell(record.session, NoRoom(leg, free_blocks, self._policy.retry_after_ms))

    def _on_failed(self, leg: LegId, cause: Cause, detail: str) -> None:
        """Also of a leg that was aborted meanwhile: the engine waits for QuiesceReservation."""
        record = self._legs.pop(leg, None)
        if record is not None:
            self._outbox.tell(record.session, Failed(leg, cause, detail))
        if not self._prefixes.failed(leg):
            self._carry_out(self.reservations.failed(leg))

    # ── from the fetch ───────────────────────────────────────────────────────────────────────────

    def fetch_ended(
        self, leg: LegId, stats: TransferStats, first_tokens: Iterable[TokenChunk], now_ms: int
    ) -> None:
        """Everything arrived. First tokens that do not fit the request end the fetch as failed."""
        record = self._legs.get(leg)
        if record is None:  # aborted meanwhile
            self._carry_out(self.reservations.fetch_ended(leg))
            return
        num_tokens = self.reservations.num_tokens(leg)
        try:
            chunks: tuple[TokenChunk, ...] = ()
            if num_tokens == len(record.request.prompt_token_ids):
                chunks = _checked_first_tokens(record, leg, first_tokens, self._info.vocab_size)
        except BatonError as error:
            self.fetch_failed(leg, num_tokens, error.cause, error.message, now_ms)
            return
        for effect in self.reservations.fetch_ended(leg):
            assert isinstance(effect, ImportKV), effect
            self._outbox.post(commands.KVImported(leg, chunks))
            self._outbox.tell(record.session, Imported(leg, stats))

    def fetch_failed(
        self, leg: LegId, valid_tokens: int, cause: Cause, detail: str, now_ms: int
    ) -> None:
        self._carry_out(self.reservations.fetch_failed(leg, valid_tokens, cause, detail, now_ms))

    def tick(self, now_ms: int) -> None:
        self._carry_out(self.reservations.tick(now_ms))

    # ── effects ──────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, effects: Iterable[ReservationEffect]) -> None:
        for effect in effects:
            match effect:
                case StartFetch():
                    self._fetch(effect)
                case KeepVerified(leg, valid_tokens):
                    self._outbox.post(commands.KVFailed(leg, valid_tokens))
                case ComputeMissing(leg):
                    self._outbox.post(commands.ComputeHere(leg))
                case DropReservation(leg, in_flight):
                    self._outbox.post(commands.Abort(leg, in_flight=in_flight))
                case QuiesceReservation(leg):
                    self._outbox.post(commands.Quiesced(leg))
                case AskDecision(leg, valid_tokens, cause, detail):
                    question = KvFailed(leg, valid_tokens, cause, detail)
                    self._outbox.tell(self._legs[leg].session, question)
                case ReservationEnded(leg, cause, detail):
                    record = self._legs.pop(leg)
                    self._outbox.tell(record.session, Failed(leg, cause, detail))
                case ImportKV():
                    raise AssertionError("handled where the first tokens are")
                case _:
                    self._outbox.emit(effect)

    def _fetch(self, start: StartFetch) -> None:
        source, request = start.source, self._legs[start.leg].request
        layout = self._info.layout
        fetch = FetchOpen(
            source=source.ticket,
            range=KVRange(0, layout.num_layers, start.token_start, start.num_tokens),
            layout=layout,
            fingerprint=self._info.fingerprint,
            tokens_digest=source.ticket.tokens_digest,  # compared with our own by check_ticket
            salt_digest=salt_digest(request.salt),
            consumer=self._info.worker_id,
            traceparent=request.traceparent,
        )
        self._outbox.emit(
            FetchKV(start.leg, fetch, source.transports, source.host_id, start.block_ids)
        )

    def check_integrity(self) -> None:
        """Asserts every invariant; for tests and idle workers."""
        self.reservations.check_integrity()
        for record in self._legs.values():
            assert record.open_choices


def _checked_first_tokens(
    record: _DecodeLeg, leg: LegId, chunks: Iterable[TokenChunk], vocab_size: int
) -> tuple[TokenChunk, ...]:
    """One token at index 0 for every choice that has none yet, told apart from the producer's leg.

    Raises:
        BatonError: PROTOCOL.
    """
    first_tokens: dict[int, TokenChunk] = {}
    for chunk in chunks:
        if chunk.choice not in record.open_choices:
            continue  # aborted or finished meanwhile
        if chunk.start != 0 or len(chunk.token_ids) != 1 or chunk.choice in first_tokens:
            raise BatonError(Cause.PROTOCOL, "the end frame's first tokens make no sense")
        if not 0 <= chunk.token_ids[0] < vocab_size:
            raise BatonError(Cause.PROTOCOL, "a first token is outside the vocabulary")
        first_tokens[chunk.choice] = chunk._replace(leg=leg)
    for choice in record.open_choices:
        if choice not in first_tokens and not record.request.committed(choice):
            raise BatonError(Cause.PROTOCOL, f"the end frame lacks the first token of {choice}")
    return tuple(first_tokens[choice] for choice in sorted(first_tokens))
