"""The request machine through a dispatcher with real router: every exit of every state."""

from dataclasses import replace

import pytest

from baton.errors import BatonError, Cause
from baton.gateway.backend import PrefillPath
from baton.gateway.legs import Ended
from baton.gateway.request_machine import FORECAST_TRUST
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    Imported,
    KvFailed,
    LeaseLost,
    NoRoom,
    Progress,
    Queued,
    Release,
    StepBatch,
    Submit,
)
from baton.types import (
    FinishReason,
    Role,
    TokenChunk,
    TransferStats,
    WorkerSnapshot,
)
from tests.gateway.fleet import D1, D2, P1, P2, Gateway
from tests.gateway.support import request, ticket, worker_info


def test_the_eight_steps() -> None:
    gateway = Gateway(P1, D1)
    machine = gateway.open()
    p, submit = gateway.take_one(Submit)
    assert p == "p1"
    gateway.now = 3
    gateway.say(p, Queued(submit.leg))
    gateway.now = 10
    gateway.say(p, Admitted(submit.leg, 16, ticket(P1)), Progress(submit.leg, 16, 500.0))
    assert gateway.take() == [], "the forecast says that there is time"
    gateway.now = 20
    gateway.say(p, TokenChunk(submit.leg, 0, 0, (5,)))
    assert gateway.tokens == {0: [5]}, "the first token comes from P"
    d, bind = gateway.take_one(Bind)
    assert d == "d1"
    assert bind.ticket == ticket(P1)
    assert bind.request.output_token_ids == ((5,),)
    gateway.say(d, Bound(bind.leg, 0), Imported(bind.leg, TransferStats("local", 9, 1, 40, 1.0)))
    gateway.say(d, TokenChunk(bind.leg, 0, 0, (5, 6)), TokenChunk(bind.leg, 0, 2, (7,)))
    gateway.say(d, TokenChunk(bind.leg, 0, 3, (8,), finish_reason=FinishReason.STOP))
    assert gateway.tokens == {0: [5, 6, 7, 8]}
    assert gateway.ended == Ended()
    assert gateway.take() == [("p1", Release(submit.leg))], "D ended by itself"
    report = machine.report
    assert report.path is PrefillPath.REMOTE
    assert (report.queue_ms, report.prefill_ms) == (10, 10)
    assert report.num_cached_tokens == 16
    assert report.num_attempts == 2
    assert not gateway.dispatcher.machines


def test_binds_when_the_forecast_says_so() -> None:
    gateway = Gateway(P1, D1)
    p, leg = gateway.submitted()
    gateway.say(p, Admitted(leg, 0, ticket(P1)), Progress(leg, 16, 300.0))
    assert gateway.take() == []
    gateway.wait(FORECAST_TRUST * 300 - 10)
    assert gateway.take() == []
    gateway.wait(9)
    d, bind = gateway.take_one(Bind)
    assert d == "d1"
    assert bind.request.output_token_ids == ()


def test_binds_at_once_when_the_transfer_is_the_longer() -> None:
    gateway = Gateway(P1, D1)
    p, leg = gateway.submitted()
    gateway.dispatcher.fleet.link("p1", "d1").model.bytes_per_ms = 1.0
    gateway.say(p, Admitted(leg, 0, ticket(P1)), Progress(leg, 16, 1000.0))
    gateway.take_one(Bind)


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_finished_on_the_first_token_binds_no_d(reason: FinishReason) -> None:
    gateway = Gateway(P1, D1)
    p, leg = gateway.admitted()
    gateway.say(p, TokenChunk(leg, 0, 0, (2,), finish_reason=reason))
    assert gateway.ended == Ended()
    assert gateway.take() == [("p1", Release(leg))]


def test_finished_on_the_first_token_aborts_a_bind() -> None:
    gateway = Gateway(P1, D1)
    p, leg = gateway.admitted()
    gateway.say(p, Progress(leg, 40, 0.0))
    _, bind = gateway.take_one(Bind)
    gateway.say(p, TokenChunk(leg, 0, 0, (2,), finish_reason=FinishReason.STOP))
    assert gateway.take() == [("d1", Abort(bind.leg)), ("p1", Release(leg))]


def test_stop_string_on_one_of_two_choices() -> None:
    gateway = Gateway(P1, D1)
    _, p_leg, d, bind = gateway.held(request(n=2))
    gateway.dispatcher.finish_choice("r", 0, gateway.now)
    assert gateway.take() == [("d1", Abort(bind.leg, 0))]
    gateway.say(d, Bound(bind.leg, 0), Imported(bind.leg, TransferStats("local")))
    gateway.say(d, TokenChunk(bind.leg, 0, 1, (9,)), TokenChunk(bind.leg, 1, 1, (9,)))
    assert gateway.tokens == {0: [5], 1: [5, 9]}, "surplus is dropped"
    gateway.dispatcher.finish_choice("r", 1, gateway.now)
    assert gateway.ended == Ended()
    assert gateway.take() == [("d1", Abort(bind.leg)), ("p1", Release(p_leg))]


def test_unfinished_choices_alone_are_bound() -> None:
    gateway = Gateway(P1, D1)
    p, leg = gateway.admitted(request(n=2))
    gateway.say(p, TokenChunk(leg, 0, 0, (2,), finish_reason=FinishReason.STOP))
    assert gateway.take() == [], "the other first token is still to come"
    gateway.say(p, TokenChunk(leg, 1, 0, (7,)))
    _, bind = gateway.take_one(Bind)
    assert bind.request.finished_choices == {0}
    assert bind.request.output_token_ids == ((2,), (7,))


@pytest.mark.parametrize("is_admitted", [False, True])
def test_p_lost_before_any_d(is_admitted: bool) -> None:
    gateway = Gateway(P1, P2, D1)
    p, leg = gateway.admitted() if is_admitted else gateway.submitted()
    gateway.lose(p)
    other, submit = gateway.take_one(Submit)
    assert other != p
    assert submit.leg.attempt == leg.attempt + 1
    gateway.say(p, TokenChunk(leg, 0, 0, (5,)))
    assert gateway.tokens == {}, "a lost session says nothing any more"


def test_p_lost_and_no_other_p_prefills_on_d() -> None:
    gateway = Gateway(P1, D1)
    gateway.submitted()
    gateway.lose("p1")
    worker_id, _ = gateway.take_one(ComputeLocally)
    assert worker_id == "d1"


def test_p_lost_during_the_import_keeps_the_leg_on_d() -> None:
    gateway = Gateway(P1, D1)
    _, _, d, bind = gateway.held()
    gateway.say(d, Bound(bind.leg, 0))
    gateway.lose("p1")
    worker_id, local = gateway.take_one(ComputeLocally)
    assert isinstance(local, ComputeLocally)
    assert (worker_id, local.leg) == (d, bind.leg)
    assert local.request.output_token_ids == ((5,),)
    gateway.say(d, KvFailed(bind.leg, 16, Cause.TRANSPORT_FAILED))
    assert gateway.take() == [], "decided already"


def test_p_lost_before_d_answered_waits_for_the_answer() -> None:
    gateway = Gateway(P1, D1)
    _, _, d, bind = gateway.held()
    gateway.lose("p1")
    assert gateway.take() == []
    gateway.say(d, Bound(bind.leg, 0))
    gateway.take_one(ComputeLocally)


def test_p_lost_and_another_p_is_faster() -> None:
    gateway = Gateway(P1, P2, D1)
    p, _, d, bind = gateway.held()
    gateway.say(d, Bound(bind.leg, 0))
    worker = gateway.dispatcher.fleet.get(d)
    assert worker is not None
    worker.snapshot = replace(worker.snapshot, queued_prefill_tokens=100_000)
    gateway.lose(p)
    (first, abort), (second, submit) = gateway.take()
    assert (first, abort) == (d, Abort(bind.leg)), "D's reservation goes before P's is asked for"
    assert isinstance(submit, Submit)
    assert second not in {p, d}


def test_p_lost_while_decoding_changes_nothing() -> None:
    gateway = Gateway(P1, D1)
    _, _, d, leg = gateway.decoding()
    gateway.lose("p1")
    assert gateway.take() == []
    gateway.say(d, TokenChunk(leg, 0, 3, (8,), finish_reason=FinishReason.LENGTH))
    assert gateway.ended == Ended()
    assert gateway.take() == []


def test_d_lost_binds_another_with_the_same_ticket() -> None:
    gateway = Gateway(P1, D1, D2)
    _, _, d, _ = gateway.decoding()
    gateway.lose(d)
    other, bind = gateway.take_one(Bind)
    assert other != d
    assert bind.ticket == ticket(P1)
    assert bind.request.output_token_ids == ((5, 6, 7),)
    gateway.say(other, Bound(bind.leg, 0), Imported(bind.leg, TransferStats("local")))
    gateway.say(other, TokenChunk(bind.leg, 0, 2, (7, 8), finish_reason=FinishReason.LENGTH))
    assert gateway.tokens == {0: [5, 6, 7, 8]}
    assert gateway.ended == Ended()


def test_d_lost_and_lease_gone_submits_anew() -> None:
    gateway = Gateway(P1, D1, D2)
    p, p_leg, d, _ = gateway.decoding()
    gateway.say(p, LeaseLost(p_leg, Cause.LEASE_UNKNOWN))
    gateway.lose(d)
    (_, release), (_, submit) = gateway.take()
    assert release == Release(p_leg)
    assert isinstance(submit, Submit)
    assert submit.request.output_token_ids == ((5, 6, 7),)


def test_no_d_left_decodes_on_p() -> None:
    gateway = Gateway(P1, D1)
    p, p_leg, d, _ = gateway.decoding()
    gateway.lose(d)
    (first, local), (second, release) = gateway.take()
    assert first == second == p
    assert isinstance(local, ComputeLocally)
    assert local.request.output_token_ids == ((5, 6, 7),)
    assert release == Release(p_leg)


def test_no_room_on_p_prefills_on_d() -> None:
    gateway = Gateway(P1, D1)
    p, leg = gateway.submitted()
    gateway.say(p, NoRoom(leg, 0, 100))
    worker_id, _ = gateway.take_one(ComputeLocally)
    assert worker_id == "d1"


def test_no_room_on_d_tries_another_then_waits() -> None:
    gateway = Gateway(P1, D1, D2)
    _, _, d, bind = gateway.held()
    gateway.say(d, NoRoom(bind.leg, 0, 100))
    other, again = gateway.take_one(Bind)
    assert other != d
    gateway.say(other, NoRoom(again.leg, 0, 500))
    assert gateway.take() == []
    gateway.wait(99)
    assert gateway.take() == []
    gateway.wait(2)
    worker_id, _ = gateway.take_one(Bind)
    assert worker_id == d


def test_room_wakes_the_earliest_deadline_first() -> None:
    gateway = Gateway(P1, D1)
    legs = {}
    gateway.say("d1", free_blocks=0)
    for name, deadline in (("late", 9000), ("early", 5000)):
        p, legs[name] = gateway.admitted(request(request_id=name, deadline_ms=deadline))
        gateway._deliver = lambda *_: None  # type: ignore[method-assign]
        gateway.tokens.clear()
        gateway.say(p, TokenChunk(legs[name], 0, 0, (5,)))
        assert gateway.take() == []
    gateway.say("d1", free_blocks=4)
    _, bind = gateway.take_one(Bind)
    assert bind.leg.request_id == "early"


def test_one_who_waited_long_is_not_passed() -> None:
    gateway = Gateway(P1, D1)
    gateway.say("d1", free_blocks=4)
    p, leg = gateway.admitted(request(100, request_id="big"))
    gateway.say(p, TokenChunk(leg, 0, 0, (5,)))
    assert gateway.take() == [], "seven blocks are needed"
    gateway.now += 1001
    gateway.say("d1", free_blocks=5)
    gateway.tokens.clear()
    p, leg = gateway.admitted(request(20, request_id="small"))
    gateway.say(p, TokenChunk(leg, 0, 0, (5,)))
    assert gateway.take() == [], "it would fit, but another has waited longer"
    gateway.say("d1", free_blocks=60)
    assert [message.leg.request_id for _, message in gateway.take()] == ["big", "small"]


@pytest.mark.parametrize("state", ["submitted", "admitted", "held", "decoding"])
def test_cancel_is_legal_in_every_state(state: str) -> None:
    gateway = Gateway(P1, D1)
    legs = getattr(gateway, state)()
    gateway.take()
    gateway.dispatcher.cancel("r", gateway.now)
    assert gateway.ended is not None
    assert gateway.ended.cause is Cause.CANCELLED
    sent = gateway.take()
    assert sent[-1][0] == "p1"
    assert isinstance(sent[-1][1], Release if state in {"held", "decoding"} else Abort)
    assert len(sent) == len(legs) // 2


def test_deadline() -> None:
    gateway = Gateway(P1, D1)
    _, leg = gateway.submitted(request(deadline_ms=1000))
    gateway.wait(999)
    assert gateway.ended is None
    gateway.wait(1)
    assert gateway.ended is not None
    assert gateway.ended.cause is Cause.DEADLINE_EXCEEDED
    assert gateway.take() == [("p1", Abort(leg))]


def test_no_worker_is_refused_at_once() -> None:
    gateway = Gateway()
    with pytest.raises(BatonError) as caught:
        gateway.open()
    assert caught.value.cause is Cause.NO_WORKER


def test_never_fits_is_refused_at_once() -> None:
    gateway = Gateway(worker_info("w", num_blocks=2))
    with pytest.raises(BatonError) as caught:
        gateway.open()
    assert caught.value.cause is Cause.NEVER_FITS


def test_waits_for_a_worker_once_something_was_computed() -> None:
    gateway = Gateway(worker_info("w"))
    gateway.open()
    _, local = gateway.take_one(ComputeLocally)
    gateway.say("w", TokenChunk(local.leg, 0, 0, (5,)))
    gateway.lose("w")
    assert gateway.ended is None
    gateway.wait(5000)
    gateway.infos["w"] = worker_info("w", incarnation=2)
    gateway.back("w")
    _, again = gateway.take_one(ComputeLocally)
    assert again.request.output_token_ids == ((5,),)


def test_never_is_not_said_of_a_request_that_ran() -> None:
    """The one worker that is large enough is gone for good; a larger one may still come."""
    gateway = Gateway(worker_info("big"), worker_info("small", num_blocks=2))
    gateway.open()
    assert gateway.take_one(ComputeLocally)[0] == "big"
    gateway.lose("big")
    gateway.dispatcher.fleet.forget("big")
    gateway.wait(5000)
    assert gateway.ended is None
    gateway.wait(5000)
    assert gateway.ended is not None
    assert gateway.ended.cause is Cause.NO_WORKER


def test_a_producer_that_is_too_small_to_decode_lets_go() -> None:
    """Prompt and output need 4 blocks; P has 3, and the one D is lost before it is bound."""
    small = worker_info("p1", Role.PREFILL, num_blocks=3)
    gateway = Gateway(small, D1)
    p, leg = gateway.admitted(request(max_tokens=16))
    gateway.lose("d1")
    gateway.say(p, TokenChunk(leg, 0, 0, (5,)))
    assert gateway.take() == [("p1", Release(leg))]
    assert gateway.ended is None
    gateway.back("d1")
    assert gateway.take_one(Submit)[1].request.output_token_ids == ((5,),)


def test_but_not_for_ever() -> None:
    gateway = Gateway(worker_info("w"))
    gateway.open()
    gateway.lose("w")
    gateway.wait(10_000)
    assert gateway.ended is not None
    assert gateway.ended.cause is Cause.NO_WORKER


def test_a_stuck_worker_is_dropped() -> None:
    gateway = Gateway(P1, D1)
    snapshot = WorkerSnapshot(Role.PREFILL, step_age_ms=11_000, total_blocks=64)
    gateway.dispatcher.received("p1", StepBatch((), snapshot), 0)
    assert gateway.dropped == ["p1"]
