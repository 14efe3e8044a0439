"""WorkerMachine, event by event: what it answers and what it asks for."""

from dataclasses import replace
from typing import TypeVar

import pytest

from baton.engine import commands
from baton.engine.events import (
    KVReserved,
    LeaseEvicted,
    LegAdmitted,
    LegEvent,
    LegFailed,
    LegPinned,
    LegRefused,
    LegTokens,
    PrefillProgress,
    StepOutput,
)
from baton.errors import Cause
from baton.grants import GrantKeys
from baton.hashing import salt_digest, tokens_digest
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachmentReady,
    AttachmentSampled,
    AttachRefused,
    CancelFetch,
    CutAttachment,
)
from baton.kvtransfer.progress import KVReady
from baton.kvtransfer.ticket import TicketKeyring
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    Failed,
    Heartbeat,
    Hello,
    Imported,
    KvFailed,
    LeaseLost,
    LegMessage,
    NoRoom,
    Progress,
    Queued,
    Rebind,
    Release,
    StepBatch,
    Submit,
)
from baton.types import (
    BlockId,
    FinishReason,
    KVGroup,
    KVKind,
    KVLayout,
    KVRange,
    KVTicket,
    LegId,
    Request,
    Role,
    SamplingParams,
    TokenChunk,
    TransferStats,
    TransportAddress,
    WorkerInfo,
    WorkerSnapshot,
)
from baton.worker.effects import CloseSession, Effect, FetchKV, Post, Send, SessionId
from baton.worker.machine import FORGET_LEG_MS, WorkerMachine
from baton.worker.policy import WorkerPolicy

S1, S2 = SessionId(1), SessionId(2)
P, D = LegId("r", 1), LegId("r", 2)
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 2, 1, 4, "float32"),), block_size=16)
PROMPT = tuple(range(40))
BLOCKS = tuple(BlockId(i) for i in (3, 5, 7))
TRANSPORTS = (TransportAddress("local", "p"),)
STATS = TransferStats("local", num_bytes=640, num_frames=2, num_tokens=40, duration_ms=1.0)
T = TypeVar("T")


class LinearPredictor:
    def prefill_ms(self, num_uncached_tokens: int, num_cached_tokens: int = 0) -> float:
        return float(num_uncached_tokens)


def info(worker_id: str = "w", num_blocks: int = 10) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=b"i" * 16,
        role=Role.BOTH,
        model="m",
        fingerprint=b"f" * 32,
        layout=LAYOUT,
        address="127.0.0.1:1",
        transports=TRANSPORTS,
        host_id="h",
        pid=1,
        device="cpu",
        num_blocks=num_blocks,
        max_model_len=128,
        max_num_seqs=8,
        vocab_size=1000,
        eos_token_ids=(0,),
    )


def request(n: int = 1, **changes: object) -> Request:
    sampling = SamplingParams(n=n, seed=1, max_tokens=8)
    return replace(Request("r", PROMPT, sampling), **changes)  # type: ignore[arg-type]


def make_machine(num_blocks: int = 10) -> WorkerMachine:
    ids = iter(range(1, 1000))
    machine = WorkerMachine(
        info(num_blocks=num_blocks),
        WorkerPolicy(),
        TicketKeyring(b"k" * 32),
        LinearPredictor(),
        GrantKeys("test", ()),
        first_epoch=100,
        random_id=lambda: next(ids).to_bytes(16, "little"),
    )
    machine.session_opened(S1, 0)
    return machine


@pytest.fixture
def machine() -> WorkerMachine:
    return make_machine()


def step(machine: WorkerMachine, *events: LegEvent, now_ms: int = 0) -> list[Effect]:
    snapshot = WorkerSnapshot(Role.BOTH, free_blocks=6, total_blocks=10)
    effects = machine.step(StepOutput(events, snapshot, None), now_ms)
    machine.check_integrity()
    return effects


def told(effects: list[Effect], session: SessionId = S1) -> list[LegMessage]:
    """All messages to one session, which must be one batch."""
    batches = [e.message for e in effects if isinstance(e, Send) and e.session == session]
    assert len(batches) <= 1
    if not batches:
        return []
    assert isinstance(batches[0], StepBatch)
    return list(batches[0].messages)


def posted(effects: list[Effect]) -> list[commands.Command]:
    return [e.command for e in effects if isinstance(e, Post)]


def only(effects: list[Effect], kind: type[T]) -> T:
    (found,) = (e for e in effects if isinstance(e, kind))
    return found


def token(
    leg: LegId, token_id: int, choice: int = 0, start: int = 0, end: bool = False
) -> LegTokens:
    reason = FinishReason.LENGTH if end else None
    return LegTokens(TokenChunk(leg, choice, start, (token_id,), finish_reason=reason))


def admit(machine: WorkerMachine, leg: LegId = P, session: SessionId = S1, n: int = 1) -> KVTicket:
    """Submit and let the engine reserve the blocks."""
    machine.receive(session, Submit(leg, request(n)), 0)
    (admitted,) = told(step(machine, LegAdmitted(leg, BLOCKS, len(PROMPT), 16)), session)
    assert isinstance(admitted, Admitted)
    assert admitted.ticket is not None
    return admitted.ticket


def fetch_open(ticket: KVTicket, token_start: int = 0) -> FetchOpen:
    return FetchOpen(
        source=ticket,
        range=KVRange(0, 2, token_start, len(PROMPT)),
        layout=replace(LAYOUT, block_size=32),
        fingerprint=b"f" * 32,
        tokens_digest=tokens_digest(PROMPT),
        salt_digest=salt_digest(b""),
        consumer="d",
    )


def bound(machine: WorkerMachine, n: int = 1) -> FetchKV:
    """Bind and let the engine reserve; the fetch that follows."""
    machine.receive(S1, Bind(D, request(n), admit_elsewhere(n), TRANSPORTS, "h"), 0)
    effects = step(machine, KVReserved(D, BLOCKS, len(PROMPT), 16))
    assert told(effects) == [Bound(D, 16)]
    return only(effects, FetchKV)


def admit_elsewhere(n: int = 1) -> KVTicket:
    return admit(make_machine(), n=n)


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────


def test_a_session_begins_with_hello() -> None:
    machine = make_machine()
    (hello,) = machine.session_opened(S2, 0)
    assert hello == Send(S2, Hello(info()))


def test_a_heartbeat_is_answered_with_the_load(machine: WorkerMachine) -> None:
    step(machine)
    (beat,) = machine.receive(S1, Heartbeat(7), 5)
    assert isinstance(beat, Send)
    assert isinstance(beat.message, StepBatch)
    assert beat.message.heartbeat_seq == 7
    assert beat.message.snapshot.free_blocks == 6


def test_a_silent_session_is_closed_and_its_legs_aborted(machine: WorkerMachine) -> None:
    machine.receive(S1, Submit(P, request()), 0)
    assert machine.tick(500) == machine.tick(1_500) == machine.tick(2_500) == []
    effects = machine.tick(2_501)
    assert posted(effects) == [commands.Abort(P)]
    assert only(effects, CloseSession).session == S1
    assert machine.is_idle


def test_a_pause_of_the_worker_itself_is_nobodys_silence(machine: WorkerMachine) -> None:
    machine.tick(100)
    assert machine.tick(60_000) == []
    machine.receive(S1, Heartbeat(1), 60_001)
    assert machine.tick(61_000) == []


def test_a_lost_session_takes_everything_with_it(machine: WorkerMachine) -> None:
    ticket = admit(machine)
    epoch = only(machine.attach(1, fetch_open(ticket), 0), AttachGranted).epoch
    fetch = bound(machine)
    effects = machine.session_lost(S1, 0)
    assert commands.Abort(P, in_flight=True) in posted(effects)
    assert commands.Abort(D, in_flight=True) in posted(effects)
    assert only(effects, CutAttachment).epoch == epoch
    assert only(effects, CancelFetch).leg == fetch.leg
    assert not [e for e in effects if isinstance(e, Send)]
    assert posted(machine.attachment_closed(epoch, 0)) == [commands.Quiesced(P)]
    cancelled = machine.fetch_failed(D, 16, Cause.CANCELLED, "", 0)
    assert posted(cancelled) == [commands.Quiesced(D)]
    assert machine.is_idle


def test_sessions_do_not_touch_each_others_legs(machine: WorkerMachine) -> None:
    machine.session_opened(S2, 0)
    machine.receive(S1, Submit(P, request()), 0)
    assert machine.receive(S2, Abort(P), 0) == []
    (refusal,) = told(machine.receive(S2, Submit(P, request()), 0), S2)
    assert isinstance(refusal, Failed)
    assert refusal.cause is Cause.PROTOCOL
    assert machine.session_lost(S2, 0) == []
    assert P in machine.producer


def test_messages_of_one_step_are_one_batch_per_session(machine: WorkerMachine) -> None:
    machine.session_opened(S2, 0)
    other = LegId("s", 1)
    machine.receive(S1, ComputeLocally(D, request()), 0)
    machine.receive(S2, ComputeLocally(other, request(request_id="s")), 0)
    events = (token(D, 5), token(other, 6), token(D, 7, start=1))
    effects = step(machine, *events)
    assert told(effects, S1) == [events[0].chunk, events[2].chunk]
    assert told(effects, S2) == [events[1].chunk]


# ── prefill ──────────────────────────────────────────────────────────────────────────────────────


def test_a_prefill_from_submit_to_release(machine: WorkerMachine) -> None:
    effects = machine.receive(S1, Submit(P, request()), 0)
    assert told(effects) == [Queued(P)]
    assert posted(effects) == [commands.AddPrefill(P, request())]
    effects = step(
        machine,
        LegAdmitted(P, BLOCKS, len(PROMPT), 16),
        PrefillProgress(P, 32),
    )
    admitted, progress = told(effects)
    assert isinstance(admitted, Admitted)
    assert progress == Progress(P, 32, 8.0)
    assert told(step(machine, token(P, 9))) == [token(P, 9).chunk]
    assert posted(machine.receive(S1, Release(P), 0)) == [commands.Release(P)]
    assert machine.is_idle
    assert machine.receive(S1, Release(P), 0) == []  # crossed


def test_a_prediction_counts_who_came_before(machine: WorkerMachine) -> None:
    later = LegId("s", 1)
    for leg in (P, later):
        machine.receive(S1, Submit(leg, request(request_id=leg.request_id)), 0)
    step(machine, LegAdmitted(P, BLOCKS, 40, 0), LegAdmitted(later, BLOCKS, 40, 0))
    (progress,) = told(step(machine, PrefillProgress(later, 16)))
    assert progress == Progress(later, 16, 40.0 + 24.0)


def test_readers_are_woken_and_told_the_first_tokens(machine: WorkerMachine) -> None:
    ticket = admit(machine)
    grant = only(machine.attach(1, fetch_open(ticket), 0), AttachGranted)
    assert (grant.ready, grant.first_tokens) == (KVReady(16), None)
    ready = only(machine.layers_ready(P, KVRange(0, 1, 16, 40), 0), AttachmentReady)
    assert ready == AttachmentReady((grant.epoch,), KVReady(16, 40, 1))
    later = only(machine.attach(2, fetch_open(ticket), 0), AttachGranted)
    assert later.ready == KVReady(16, 40, 1), "who comes during the step reads what is there"
    ready = only(step(machine, PrefillProgress(P, 40)), AttachmentReady)
    assert ready == AttachmentReady((grant.epoch, later.epoch), KVReady(40))
    assert machine.layers_ready(P, KVRange(0, 1, 16, 40), 0) == [], "old news"
    assert machine.layers_ready(LegId("gone", 1), KVRange(0, 1, 0, 40), 0) == []
    sampled = only(step(machine, token(P, 9, end=True)), AttachmentSampled)
    assert sampled == AttachmentSampled((grant.epoch, later.epoch), (token(P, 9, end=True).chunk,))


def test_first_tokens_are_complete_when_every_open_choice_has_one(machine: WorkerMachine) -> None:
    ticket = admit(machine, n=3)
    epoch = only(machine.attach(1, fetch_open(ticket), 0), AttachGranted).epoch
    effects = step(machine, token(P, 9, choice=2), token(P, 8, choice=0))
    assert not [e for e in effects if isinstance(e, AttachmentSampled)]
    effects = machine.receive(S1, Abort(P, 1), 0)
    assert posted(effects) == [commands.Abort(P, 1)]
    sampled = only(effects, AttachmentSampled)
    assert sampled.epochs == (epoch,)
    assert [chunk.choice for chunk in sampled.first_tokens] == [0, 2]


def test_aborting_every_choice_aborts_the_leg(machine: WorkerMachine) -> None:
    admit(machine, n=2)
    machine.receive(S1, Abort(P, 0), 0)
    assert posted(machine.receive(S1, Abort(P, 1), 0)) == [commands.Abort(P)]
    assert machine.is_idle


def test_a_read_lease_is_retained_then_evicted(machine: WorkerMachine) -> None:
    ticket = admit(machine)
    epoch = only(machine.attach(1, fetch_open(ticket), 0), AttachGranted).epoch
    step(machine, token(P, 9))
    machine.attachment_done(epoch)
    assert posted(machine.attachment_closed(epoch, 0)) == [commands.Retain(P)]
    assert posted(machine.attach(2, fetch_open(ticket), 0)) == [commands.Pin(P)]
    second = only(step(machine, LegPinned(P)), AttachGranted)
    assert second.epoch != epoch
    assert second.first_tokens is not None
    machine.attachment_done(second.epoch)
    machine.attachment_closed(second.epoch, 0)
    assert told(step(machine, LeaseEvicted(P))) == [LeaseLost(P, Cause.LEASE_UNKNOWN)]
    assert machine.is_idle


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"fingerprint": b"x" * 32}, Cause.MODEL_MISMATCH),
        ({"layout": replace(LAYOUT, groups=LAYOUT.groups * 2)}, Cause.LAYOUT_INCOMPATIBLE),
        ({"tokens_digest": b"x" * 32}, Cause.TOKENS_MISMATCH),
        ({"salt_digest": b"x" * 32}, Cause.TENANT_MISMATCH),
        ({"range": KVRange(0, 2, 0, 41)}, Cause.PROTOCOL),
        ({"range": KVRange(0, 1, 0, 40)}, Cause.PROTOCOL),
    ],
)
def test_a_fetch_must_match_its_ticket(
    machine: WorkerMachine, change: dict[str, object], cause: Cause
) -> None:
    fetch = replace(fetch_open(admit(machine)), **change)  # type: ignore[arg-type]
    assert only(machine.attach(1, fetch, 0), AttachRefused).cause is cause


def test_tickets_of_others_are_refused(machine: WorkerMachine) -> None:
    ticket = admit(machine)
    for bad, cause in (
        (replace(ticket, num_tokens=41), Cause.TICKET_FORGED),
        (replace(ticket, key_id=9), Cause.TICKET_FORGED),
        (replace(ticket, incarnation=b"j" * 16), Cause.LEASE_UNKNOWN),
    ):
        fetch = replace(fetch_open(ticket), source=bad)
        assert only(machine.attach(1, fetch, 0), AttachRefused).cause is cause
    late = WorkerPolicy().lease_ttl_ms
    assert only(machine.attach(1, fetch_open(ticket), late), AttachRefused).cause is (
        Cause.TICKET_EXPIRED
    )


def test_an_expired_lease_ends_by_itself(machine: WorkerMachine) -> None:
    admit(machine)
    now_ms = WorkerPolicy().lease_ttl_ms
    machine.receive(S1, Heartbeat(1), now_ms)
    effects = machine.tick(now_ms)
    assert posted(effects) == [commands.Abort(P)]  # it was not computed yet
    assert told(effects) == [LeaseLost(P, Cause.TICKET_EXPIRED)]


def test_complete_kv_that_nobody_reads_may_be_evicted(machine: WorkerMachine) -> None:
    ticket = admit(machine)
    step(machine, token(P, 9), now_ms=100)
    limit_ms = 100 + WorkerPolicy().lease_idle_ms
    assert posted(machine.tick(limit_ms)) == []
    assert posted(machine.tick(limit_ms + 1)) == [commands.Retain(P)]
    assert posted(machine.attach(1, fetch_open(ticket), limit_ms + 2)) == [commands.Pin(P)]


def test_above_the_lease_watermark_there_is_no_room() -> None:
    machine = make_machine(num_blocks=7)  # three leased blocks and three more exceed 80 %
    admit(machine)
    effects = machine.receive(S1, Submit(LegId("s", 1), request(request_id="s")), 0)
    (refusal,) = told(effects)
    assert isinstance(refusal, NoRoom)
    assert refusal.retry_after_ms >= WorkerPolicy().retry_after_ms
    assert posted(effects) == []


def test_a_failed_prefill_waits_for_its_reader(machine: WorkerMachine) -> None:
    ticket = admit(machine)
    epoch = only(machine.attach(1, fetch_open(ticket), 0), AttachGranted).epoch
    effects = step(machine, LegFailed(P, Cause.STEP_FAILED, "boom"))
    assert told(effects) == [Failed(P, Cause.STEP_FAILED, "boom")]
    assert posted(effects) == []
    assert only(effects, CutAttachment).epoch == epoch
    assert posted(machine.attachment_closed(epoch, 0)) == [commands.Quiesced(P)]


# ── decode ───────────────────────────────────────────────────────────────────────────────────────


def test_a_decode_from_bind_to_the_last_token(machine: WorkerMachine) -> None:
    ticket = admit_elsewhere()
    effects = machine.receive(S1, Bind(D, request(), ticket, TRANSPORTS, "h"), 0)
    assert posted(effects) == [commands.AddDecode(D, request(), len(PROMPT))]
    fetch = only(step(machine, KVReserved(D, BLOCKS, len(PROMPT), 16)), FetchKV)
    assert fetch.fetch.range == KVRange(0, 2, 16, 40)
    assert fetch.block_ids == BLOCKS
    effects = machine.fetch_ended(D, STATS, [token(P, 9).chunk], 0)
    assert posted(effects) == [commands.KVImported(D, (token(D, 9).chunk,))]
    assert told(effects) == [Imported(D, STATS)]
    step(machine, token(D, 9), token(D, 10, start=1, end=True))
    assert machine.is_idle
    assert machine.receive(S1, Abort(D), 0) == []


def test_a_ticket_for_another_request_is_refused_at_bind(machine: WorkerMachine) -> None:
    other = request(prompt_token_ids=(*PROMPT[:-1], 99))
    effects = machine.receive(S1, Bind(D, other, admit_elsewhere(), TRANSPORTS, "h"), 0)
    (refusal,) = told(effects)
    assert isinstance(refusal, Failed)
    assert refusal.cause is Cause.TOKENS_MISMATCH
    assert posted(effects) == []
    assert machine.is_idle


def test_no_room_at_bind_holds_nothing(machine: WorkerMachine) -> None:
    machine.receive(S1, Bind(D, request(), admit_elsewhere(), TRANSPORTS, "h"), 0)
    (refusal,) = told(step(machine, LegRefused(D, 2)))
    assert refusal == NoRoom(D, 2, WorkerPolicy().retry_after_ms)
    assert machine.is_idle


def test_a_failed_fetch_is_told_and_refetched(machine: WorkerMachine) -> None:
    fetch = bound(machine)
    effects = machine.fetch_failed(D, 32, Cause.FRAME_CORRUPT, "checksum", 0)
    assert told(effects) == [KvFailed(D, 32, Cause.FRAME_CORRUPT, "checksum")]
    assert posted(effects) == [commands.KVFailed(D, 32)]
    again = machine.receive(S1, Rebind(D, fetch.fetch.source, TRANSPORTS, "h"), 0)
    assert only(again, FetchKV).fetch.range.token_start == 32


def test_a_failed_fetch_is_computed_locally(machine: WorkerMachine) -> None:
    bound(machine)
    machine.fetch_failed(D, 32, Cause.TRANSPORT_FAILED, "", 0)
    effects = machine.receive(S1, ComputeLocally(D, request()), 0)
    assert posted(effects) == [commands.ComputeHere(D)]
    assert told(step(machine, PrefillProgress(D, 40))) == [Progress(D, 40, 0.0)]
    step(machine, token(D, 9, end=True))
    assert machine.is_idle


def test_a_decision_may_come_before_the_fetch_has_failed(machine: WorkerMachine) -> None:
    bound(machine)
    effects = machine.receive(S1, ComputeLocally(D, request()), 0)
    assert only(effects, CancelFetch).leg == D
    effects = machine.fetch_failed(D, 16, Cause.CANCELLED, "", 0)
    assert posted(effects) == [commands.KVFailed(D, 16), commands.ComputeHere(D)]
    assert told(effects) == []


def test_undecided_legs_end(machine: WorkerMachine) -> None:
    bound(machine)
    machine.fetch_failed(D, 16, Cause.TRANSPORT_FAILED, "", 0)
    now_ms = WorkerPolicy().decide_ms
    machine.receive(S1, Heartbeat(1), now_ms)
    effects = machine.tick(now_ms)
    assert posted(effects) == [commands.Abort(D)]
    (failed,) = told(effects)
    assert isinstance(failed, Failed)
    assert failed.cause is Cause.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [token(P, 9, choice=1).chunk],
        [token(P, 9, start=1).chunk],
        [token(P, 1000).chunk],
        [token(P, 9).chunk, token(P, 9).chunk],
    ],
)
def test_first_tokens_that_make_no_sense_fail_the_fetch(
    machine: WorkerMachine, chunks: list[TokenChunk]
) -> None:
    bound(machine)
    (told_failed,) = told(machine.fetch_ended(D, STATS, chunks, 0))
    assert isinstance(told_failed, KvFailed)
    assert (told_failed.valid_tokens, told_failed.cause) == (40, Cause.PROTOCOL)


def test_aborting_the_last_choice_during_a_fetch_waits_for_the_writer(
    machine: WorkerMachine,
) -> None:
    bound(machine, n=2)
    assert posted(machine.receive(S1, Abort(D, 0), 0)) == [commands.Abort(D, 0)]
    effects = machine.receive(S1, Abort(D, 1), 0)
    assert posted(effects) == [commands.Abort(D, in_flight=True)]
    effects = machine.fetch_ended(D, STATS, [], 0)
    assert posted(effects) == [commands.Quiesced(D)]
    assert machine.is_idle


# ── the door and the end ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (request(prompt_token_ids=tuple(range(121))), Cause.CONTEXT_LENGTH_EXCEEDED),
        (request(finished_choices=frozenset({0})), Cause.INVALID_REQUEST),
        (request(finished_choices=frozenset({3})), Cause.INVALID_REQUEST),
        (request(output_token_ids=((1,), (2,))), Cause.INVALID_REQUEST),
        (request(sampling=SamplingParams()), Cause.INVALID_REQUEST),
    ],
)
def test_requests_that_cannot_be_are_refused(
    machine: WorkerMachine, bad: Request, cause: Cause
) -> None:
    effects = machine.receive(S1, Submit(P, bad), 0)
    (failed,) = told(effects)
    assert isinstance(failed, Failed)
    assert failed.cause is cause
    assert posted(effects) == []


def test_a_leg_id_is_used_once(machine: WorkerMachine) -> None:
    machine.receive(S1, ComputeLocally(D, request()), 0)
    machine.receive(S1, Abort(D), 0)
    (failed,) = told(machine.receive(S1, ComputeLocally(D, request()), 0))
    assert isinstance(failed, Failed)
    machine.receive(S1, Heartbeat(1), FORGET_LEG_MS)
    machine.tick(FORGET_LEG_MS)
    assert told(machine.receive(S1, ComputeLocally(D, request()), FORGET_LEG_MS)) == [Queued(D)]


def test_a_duplicate_of_a_living_leg_ends_it(machine: WorkerMachine) -> None:
    machine.receive(S1, Submit(P, request()), 0)
    effects = machine.receive(S1, Submit(P, request()), 0)
    assert posted(effects) == [commands.Abort(P)]
    assert machine.is_idle


def test_deadlines_end_legs(machine: WorkerMachine) -> None:
    machine.receive(S1, ComputeLocally(D, request(deadline_ms=100)), 0)
    assert machine.tick(99) == []
    effects = machine.tick(100)
    assert posted(effects) == [commands.Abort(D)]
    (failed,) = told(effects)
    assert isinstance(failed, Failed)
    assert failed.cause is Cause.DEADLINE_EXCEEDED


def test_drain_admits_nothing_but_finishes_and_serves_leases(machine: WorkerMachine) -> None:
    ticket = admit(machine)
    (notice,) = machine.drain(0)
    assert isinstance(notice, Send)
    assert isinstance(notice.message, StepBatch)
    assert notice.message.snapshot.draining
    (failed,) = told(machine.receive(S1, ComputeLocally(D, request()), 0))
    assert isinstance(failed, Failed)
    assert failed.cause is Cause.DRAINING
    grant = only(machine.attach(1, fetch_open(ticket), 0), AttachGranted)
    effects = machine.hand_over(0)
    assert told(effects) == [Failed(P, Cause.DRAINING, "the worker is shutting down")]
    machine.attachment_closed(grant.epoch, 0)
    assert machine.is_idle


def test_a_role_is_announced(machine: WorkerMachine) -> None:
    machine.set_role(Role.DECODE)
    (hello,) = machine.session_opened(S2, 0)
    assert isinstance(hello, Send)
    assert isinstance(hello.message, Hello)
    assert hello.message.info.role is Role.DECODE
    assert machine.snapshot().role is Role.DECODE
