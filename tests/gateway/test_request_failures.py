"""The request machine when legs, workers and leases fail: who goes on, and when it gives up."""

import pytest

from baton.errors import Cause
from baton.gateway.legs import Ended
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    Failed,
    KvFailed,
    LeaseLost,
    Rebind,
    Release,
    Submit,
)
from baton.types import (
    FinishReason,
    TokenChunk,
)
from tests.gateway.fleet import D1, D2, P1, P2, Gateway
from tests.gateway.support import ticket


def test_kv_failed_rebinds_once_then_computes_locally() -> None:
    gateway = Gateway(P1, D1)
    _, _, d, bind = gateway.held()
    gateway.say(d, Bound(bind.leg, 0), KvFailed(bind.leg, 16, Cause.FRAME_CORRUPT))
    _, rebind = gateway.take_one(Rebind)
    assert rebind.leg == bind.leg
    gateway.say(d, KvFailed(bind.leg, 32, Cause.TRANSPORT_FAILED))
    _, local = gateway.take_one(ComputeLocally)
    assert local.leg == bind.leg
    gateway.say(d, TokenChunk(bind.leg, 0, 1, (6,), finish_reason=FinishReason.STOP))
    assert gateway.tokens == {0: [5, 6]}
    assert gateway.ended == Ended()


@pytest.mark.parametrize("cause", [Cause.LEASE_UNKNOWN, Cause.TOKENS_MISMATCH, Cause.OVERLOADED])
def test_kv_failed_for_good_computes_locally(cause: Cause) -> None:
    gateway = Gateway(P1, D1)
    _, _, d, bind = gateway.held()
    gateway.say(d, Bound(bind.leg, 0), KvFailed(bind.leg, 0, cause))
    gateway.take_one(ComputeLocally)


def test_lease_lost_before_a_d_submits_again() -> None:
    gateway = Gateway(P1, D1)
    gateway.say("d1", free_blocks=0)
    p, leg = gateway.admitted()
    gateway.say(p, TokenChunk(leg, 0, 0, (5,)))
    assert gateway.take() == []
    gateway.say(p, LeaseLost(leg, Cause.TICKET_EXPIRED))
    (_, release), (_, submit) = gateway.take()
    assert release == Release(leg)
    assert isinstance(submit, Submit)


def test_a_gap_is_a_failed_leg() -> None:
    gateway = Gateway(P1, D1, D2)
    _, _, d, leg = gateway.decoding()
    gateway.say(d, TokenChunk(leg, 0, 5, (9,)))
    assert gateway.ended is not None
    assert gateway.ended.cause is Cause.PROTOCOL
    assert (d, Abort(leg)) in gateway.take()


def test_another_id_for_a_committed_index_is_a_defect_and_is_dropped() -> None:
    gateway = Gateway(P1, D1)
    machine = gateway.open()
    p, submit = gateway.take_one(Submit)
    gateway.say(p, Admitted(submit.leg, 0, ticket(P1)), TokenChunk(submit.leg, 0, 0, (5,)))
    d, bind = gateway.take_one(Bind)
    gateway.say(d, TokenChunk(bind.leg, 0, 0, (4, 6)))
    assert gateway.tokens == {0: [5, 6]}
    assert machine.report.num_defects == 1


def test_poison_is_not_tried_a_third_time() -> None:
    gateway = Gateway(P1, P2, D1)
    gateway.submitted()
    gateway.lose("p1")
    gateway.take()
    gateway.lose("p2")
    assert gateway.take() == []
    gateway.wait(3000)
    assert gateway.ended is not None
    assert gateway.ended.cause is Cause.WORKER_LOST
    assert gateway.dispatcher.next_wake_ms == float("inf"), "nobody is woken any more"
    assert gateway.take() == []


def test_a_lost_connection_is_not_a_death() -> None:
    gateway = Gateway(P1, P2, D1)
    gateway.submitted()
    gateway.lose("p1")
    gateway.lose("p2")
    gateway.take()
    gateway.wait(1000)
    gateway.back("p1")
    worker_id, _ = gateway.take_one(Submit)
    assert worker_id == "p1"


def test_failures_are_retried_elsewhere_and_counted() -> None:
    gateway = Gateway(P1, P2, D1)
    p, leg = gateway.submitted()
    gateway.say(p, Failed(leg, Cause.STEP_FAILED, "boom"))
    for _ in range(20):
        if gateway.ended is not None:
            break
        for worker_id, message in gateway.take():
            gateway.say(worker_id, Failed(message.leg, Cause.STEP_FAILED, "boom"))
        gateway.wait(600)
    assert gateway.ended == Ended(Cause.STEP_FAILED, "boom")


def test_a_full_worker_is_no_failure_but_waiting_has_its_limit() -> None:
    gateway = Gateway(P1, D1)
    gateway.open()
    for _ in range(1000):
        for worker_id, message in gateway.take():
            gateway.say(worker_id, Failed(message.leg, Cause.OVERLOADED, "full"))
        if gateway.ended is not None:
            break
        gateway.wait(250)
    assert gateway.ended is not None
    assert gateway.ended.cause in {Cause.OVERLOADED, Cause.NO_ROOM}
    assert gateway.now == pytest.approx(60_000, abs=1000)


def test_a_fault_of_the_request_is_not_retried() -> None:
    gateway = Gateway(P1, P2, D1)
    p, leg = gateway.submitted()
    gateway.say(p, Failed(leg, Cause.NON_FINITE_LOGITS, "nan"))
    assert gateway.ended == Ended(Cause.NON_FINITE_LOGITS, "nan")
