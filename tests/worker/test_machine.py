"""WorkerMachine, event by event: what it answers and what it asks for."""

from dataclasses import replace

import pytest

from baton.engine import commands
from baton.engine.events import (
    LeaseEvicted,
    LegAdmitted,
    LegFailed,
    LegPinned,
    PrefillProgress,
)
from baton.errors import Cause
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachmentReady,
    AttachmentSampled,
    AttachRefused,
    CancelFetch,
    CutAttachment,
)
from baton.kvtransfer.progress import KVReady
from baton.messages import (
    Abort,
    Admitted,
    ComputeLocally,
    Failed,
    Heartbeat,
    Hello,
    LeaseLost,
    NoRoom,
    Progress,
    Queued,
    Release,
    StepBatch,
    Submit,
)
from baton.types import (
    KVRange,
    LegId,
    Request,
    Role,
    SamplingParams,
)
from baton.worker.effects import CloseSession, Send
from baton.worker.machine import FORGET_LEG_MS, WorkerMachine
from baton.worker.policy import WorkerPolicy
from tests.worker.machines import (
    BLOCKS,
    LAYOUT,
    PROMPT,
    S1,
    S2,
    D,
    P,
    admit,
    bound,
    fetch_open,
    info,
    machine,
    make_machine,
    only,
    posted,
    request,
    step,
    token,
    told,
)

__all__ = ["machine"]

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
