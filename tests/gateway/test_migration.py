"""A running request changes its decode worker: what is sent, step by step, and what is left when
one of them is lost."""

from dataclasses import replace

import pytest

from baton.errors import Cause
from baton.gateway.backend import Migration, MigrationCause, MigrationResult
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    Failed,
    Imported,
    KvFailed,
    LegMessage,
    NoRoom,
    Release,
    StepBatch,
    Submit,
)
from baton.types import FinishReason, LegId, Role, TokenChunk, TransferStats, WorkerSnapshot
from tests.gateway.fleet import D1, D2, P1, Gateway
from tests.gateway.support import request, ticket, worker_info

D3 = worker_info("d3", Role.DECODE)
MOVED = TransferStats("local", 4096, 2, 32, 1.0)


class Moving(Gateway):
    """P1 prefilled, the source decodes; then the source drains."""

    def __init__(self, n: int = 1, num_prompt: int = 40) -> None:
        super().__init__(P1, D1, D2)
        self.machine = self.open(request(num_prompt, n=n, max_tokens=200))
        p, submit = self.take_one(Submit)
        self.p_leg = submit.leg
        firsts = [TokenChunk(submit.leg, choice, 0, (5,)) for choice in range(n)]
        self.say(p, Admitted(submit.leg, 0, ticket(P1)), *firsts)
        self.source, bind = self.take_one(Bind)
        self.target = "d2" if self.source == "d1" else "d1"
        self.leg = bind.leg
        self.say(self.source, Bound(bind.leg, 0), Imported(bind.leg, replace(MOVED, num_bytes=7)))
        for choice in range(n):
            self.say(self.source, TokenChunk(bind.leg, choice, 1, (6, 7)))

    def drains(self, *messages: LegMessage) -> None:
        self.now += 30
        snapshot = WorkerSnapshot(Role.DECODE, free_blocks=64, total_blocks=64, draining=True)
        self.dispatcher.received(self.source, StepBatch(messages, snapshot), self.now)

    def shared(self) -> Submit:
        self.drains()
        worker_id, submit = self.take_one(Submit)
        assert worker_id == self.source
        assert all(ids[:3] == (5, 6, 7) for ids in submit.request.output_token_ids)
        return submit

    def bound(self) -> tuple[LegId, Bind]:
        lease = self.shared().leg
        self.drains(Admitted(lease, 32, ticket(self.infos[self.source], 32)))
        worker_id, bind = self.take_one(Bind)
        assert worker_id == self.target
        assert bind.ticket.num_tokens == 32
        return lease, bind

    def computing(self) -> LegId:
        """The target's leg, of a request that has less than a block to share."""
        self.drains()
        worker_id, compute = self.take_one(ComputeLocally)
        assert worker_id == self.target
        assert all(ids == (5, 6, 7) for ids in compute.request.output_token_ids)
        return compute.leg

    def imported(self) -> tuple[LegId, LegId]:
        lease, bind = self.bound()
        self.say(self.target, Bound(bind.leg, 0), Imported(bind.leg, MOVED))
        return lease, bind.leg

    def what_became(self) -> list[Migration]:
        return list(self.machine.report.migrations)


def drained(result: MigrationResult, num_bytes: int = 0) -> list[Migration]:
    return [Migration(MigrationCause.DRAIN, result, num_bytes)]


def test_it_moves_and_nothing_is_lost_or_said_twice() -> None:
    gateway = Moving()
    lease, leg = gateway.imported()
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8, 9)))
    assert gateway.take() == [], "the source decodes on until the target does"
    gateway.say(gateway.target, TokenChunk(leg, 0, 3, (8,)))
    sent = gateway.take()
    assert sent[:1] == [(gateway.source, Abort(gateway.leg))]
    assert sent[2:] == [(gateway.source, Release(lease))]
    worker_id, catch_up = sent[1]
    assert isinstance(catch_up, ComputeLocally)
    assert (worker_id, catch_up.leg) == (gateway.target, leg)
    assert catch_up.request.output_token_ids == ((5, 6, 7, 8, 9),)
    gateway.drains(TokenChunk(gateway.leg, 0, 5, (99,)))  # after its abort
    gateway.say(gateway.target, TokenChunk(leg, 0, 4, (9, 10)))
    assert gateway.tokens == {0: [5, 6, 7, 8, 9, 10]}
    assert gateway.machine.report.decode_worker == gateway.target
    assert gateway.what_became() == drained(MigrationResult.MOVED, 4096)


def test_every_choice_has_to_be_taken_up() -> None:
    gateway = Moving(n=2)
    lease, leg = gateway.imported()
    gateway.say(gateway.target, TokenChunk(leg, 1, 3, (8,)))
    assert gateway.take() == []
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8,), (), FinishReason.STOP))  # over: not awaited
    assert (gateway.source, Release(lease)) in gateway.take()
    assert gateway.what_became() == drained(MigrationResult.MOVED, 4096)


def test_a_target_that_says_something_else_is_given_up() -> None:
    gateway = Moving()
    lease, leg = gateway.imported()
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8,)))
    gateway.say(gateway.target, TokenChunk(leg, 0, 3, (11,)))
    assert set(gateway.take()) == {(gateway.target, Abort(leg)), (gateway.source, Release(lease))}
    gateway.drains(TokenChunk(gateway.leg, 0, 4, (9,)))
    assert gateway.tokens == {0: [5, 6, 7, 8, 9]}
    assert gateway.what_became() == drained(MigrationResult.FAILED, 4096)


def test_so_is_one_that_did_so_before_it_was_brought_up() -> None:
    """It was behind when it took over: what it says until it has caught up is compared, too."""
    gateway = Moving()
    _, leg = gateway.imported()
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8, 9)))
    gateway.say(gateway.target, TokenChunk(leg, 0, 3, (8,)))
    gateway.take()
    gateway.say(gateway.target, TokenChunk(leg, 0, 4, (11, 12)))
    sent = gateway.take()
    assert (gateway.target, Abort(leg)) in sent
    assert gateway.tokens == {0: [5, 6, 7, 8, 9]}
    assert gateway.ended is None


@pytest.mark.parametrize("failure", ["no room", "failed", "kv failed", "lost"])
def test_without_the_target_the_source_goes_on(failure: str) -> None:
    gateway = Moving()
    lease, bind = gateway.bound()
    leg = bind.leg
    match failure:
        case "no room":
            gateway.say(gateway.target, NoRoom(leg, 0, 100))
        case "failed":
            gateway.say(gateway.target, Failed(leg, Cause.STEP_FAILED, ""))
        case "kv failed":
            gateway.say(gateway.target, Bound(leg, 0), KvFailed(leg, 16, Cause.FRAME_CORRUPT, ""))
        case "lost":
            gateway.lose(gateway.target)
    expected = {(gateway.source, Release(lease))}
    expected |= {(gateway.target, Abort(leg))} if failure == "kv failed" else set()
    assert set(gateway.take()) == expected
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8,)))
    assert gateway.take() == [], "not again at once"
    assert gateway.tokens == {0: [5, 6, 7, 8]}
    assert gateway.what_became() == drained(MigrationResult.FAILED)
    if failure != "lost":
        gateway.now += 1000
        gateway.shared()


def test_less_than_a_block_is_computed_while_the_source_decodes_on() -> None:
    gateway = Moving(n=2, num_prompt=5)
    leg = gateway.computing()
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8, 9)))
    gateway.say(gateway.target, Admitted(leg, 0), TokenChunk(leg, 0, 3, (8,)))
    assert gateway.take() == [], "there is another choice"
    gateway.say(gateway.target, TokenChunk(leg, 1, 3, (4,)))
    sent = gateway.take()
    assert sent[0] == (gateway.source, Abort(gateway.leg))
    worker_id, catch_up = sent[1]
    assert isinstance(catch_up, ComputeLocally)
    assert (worker_id, catch_up.leg) == (gateway.target, leg)
    assert catch_up.request.output_token_ids == ((5, 6, 7, 8, 9), (5, 6, 7, 4))
    assert gateway.what_became() == drained(MigrationResult.MOVED)


def test_less_than_a_block_and_the_source_is_lost() -> None:
    gateway = Moving(n=2, num_prompt=5)
    leg = gateway.computing()
    gateway.lose(gateway.source)
    assert gateway.take() == []
    gateway.say(gateway.target, TokenChunk(leg, 0, 3, (8,)))
    assert gateway.tokens[0] == [5, 6, 7, 8]
    assert gateway.what_became() == [Migration(MigrationCause.FAILURE, MigrationResult.RECOMPUTED)]


@pytest.mark.parametrize("answer", [NoRoom, Failed])
def test_nothing_to_share(answer: type[NoRoom] | type[Failed]) -> None:
    gateway = Moving()
    leg = gateway.shared().leg
    no_room = NoRoom(leg, 0, 100)
    gateway.drains(no_room if answer is NoRoom else Failed(leg, Cause.TOKENS_MISMATCH, ""))
    assert gateway.take() == []
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8,)))
    assert gateway.tokens == {0: [5, 6, 7, 8]}


def test_the_source_is_lost_while_the_target_fetches_from_it() -> None:
    """P still has the prompt: a leg that cannot be completed makes room for one that can."""
    gateway = Moving()
    _, bind = gateway.bound()
    gateway.say(gateway.target, Bound(bind.leg, 0))
    gateway.lose(gateway.source)
    sent = gateway.take()
    assert sent[0] == (gateway.target, Abort(bind.leg))
    worker_id, again = sent[1]
    assert isinstance(again, Bind)
    assert (worker_id, again.ticket.incarnation) == (gateway.target, P1.incarnation)
    assert again.request.output_token_ids == ((5, 6, 7),)
    assert gateway.what_became() == [Migration(MigrationCause.FAILURE, MigrationResult.ATTACHED)]


def test_the_source_is_lost_when_the_target_decodes() -> None:
    gateway = Moving()
    _, leg = gateway.imported()
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8,)))
    gateway.lose(gateway.source)
    worker_id, catch_up = gateway.take_one(ComputeLocally)
    assert (worker_id, catch_up.leg) == (gateway.target, leg)
    gateway.say(gateway.target, TokenChunk(leg, 0, 3, (8, 9)))
    assert gateway.tokens == {0: [5, 6, 7, 8, 9]}
    assert gateway.what_became() == drained(MigrationResult.MOVED, 4096)


def test_a_source_that_gives_up_leaves_its_kv_behind() -> None:
    """Only the leg failed: what the target fetches is still there."""
    gateway = Moving()
    lease, bind = gateway.bound()
    gateway.drains(Failed(gateway.leg, Cause.STEP_FAILED, ""))
    assert gateway.take() == [("p1", Release(gateway.p_leg))]
    gateway.say(gateway.target, Bound(bind.leg, 0), Imported(bind.leg, MOVED))
    gateway.say(gateway.target, TokenChunk(bind.leg, 0, 3, (8,)))
    assert gateway.tokens == {0: [5, 6, 7, 8]}
    gateway.say(gateway.target, TokenChunk(bind.leg, 0, 4, (9,), (), FinishReason.STOP))
    assert gateway.take() == [(gateway.source, Release(lease))]


@pytest.mark.parametrize("end", ["finished", "cancelled"])
def test_the_request_ends_first(end: str) -> None:
    gateway = Moving()
    lease, bind = gateway.bound()
    if end == "finished":
        gateway.drains(TokenChunk(gateway.leg, 0, 3, (8,), (), FinishReason.STOP))
    else:
        gateway.dispatcher.cancel("r", gateway.now)
    sent = set(gateway.take())
    assert {(gateway.target, Abort(bind.leg)), (gateway.source, Release(lease))} <= sent
    assert ("p1", Release(gateway.p_leg)) in sent
    assert ((gateway.source, Abort(gateway.leg)) in sent) is (end == "cancelled")
    assert gateway.what_became() == drained(MigrationResult.MOOT)


def test_who_takes_over_must_agree_with_what_the_source_said_last() -> None:
    gateway = Moving()
    _, bind = gateway.bound()
    gateway.drains(TokenChunk(gateway.leg, 0, 3, (8, 9)), Failed(gateway.leg, Cause.STEP_FAILED))
    assert gateway.take() == [("p1", Release(gateway.p_leg))]
    gateway.say(gateway.target, Bound(bind.leg, 0), Imported(bind.leg, MOVED))
    gateway.say(gateway.target, TokenChunk(bind.leg, 0, 3, (8, 99)))
    assert (gateway.target, Abort(bind.leg)) in gateway.take()
    gateway.say(gateway.target, TokenChunk(bind.leg, 0, 5, (98,)))
    assert gateway.tokens == {0: [5, 6, 7, 8, 9]}
    assert gateway.machine.report.num_defects == 1


def test_a_stop_string_ends_a_choice_on_both() -> None:
    gateway = Moving(n=2)
    _, bind = gateway.bound()
    gateway.dispatcher.finish_choice("r", 0, gateway.now)
    assert set(gateway.take()) == {
        (gateway.source, Abort(gateway.leg, 0)),
        (gateway.target, Abort(bind.leg, 0)),
    }


def test_a_lost_decode_worker_is_counted_by_how_the_request_went_on() -> None:
    gateway = Moving()
    gateway.lose(gateway.source)
    gateway.take_one(Bind)
    assert gateway.what_became() == [Migration(MigrationCause.FAILURE, MigrationResult.ATTACHED)]


def test_a_prefill_worker_that_drains_is_let_go_when_its_kv_was_read() -> None:
    gateway = Moving()
    snapshot = WorkerSnapshot(Role.PREFILL, free_blocks=64, total_blocks=64, draining=True)
    gateway.dispatcher.received("p1", StepBatch((), snapshot), gateway.now)
    assert gateway.take() == [("p1", Release(gateway.p_leg))]
    gateway.say(gateway.source, TokenChunk(gateway.leg, 0, 3, (8,)))
    assert gateway.tokens == {0: [5, 6, 7, 8]}
