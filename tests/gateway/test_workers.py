"""What the fleet counts, and that it stops counting."""

from dataclasses import replace

import pytest

from baton.errors import Cause
from baton.gateway.backend import Moved, WorkerState
from baton.gateway.workers import Fleet, Worker
from baton.messages import (
    Abort,
    Bind,
    Bound,
    ComputeLocally,
    Failed,
    Imported,
    KvFailed,
    LegMessage,
    NoRoom,
    Queued,
    StepBatch,
    Submit,
)
from baton.types import LegId, LinkRate, Role, StepTiming, TransferStats, WorkerSnapshot
from tests.gateway.support import request, ticket, worker_info

P, D = worker_info("p", Role.PREFILL), worker_info("d", Role.DECODE)
LEG = LegId("r", 1)
IDLE = WorkerSnapshot(Role.DECODE, free_blocks=64, total_blocks=64)


def fleet() -> Fleet:
    made = Fleet()
    made.joined(P)
    made.joined(D)
    return made


def worker(of: Fleet, worker_id: str) -> Worker:
    found = of.get(worker_id)
    assert found is not None
    return found


def bind() -> Bind:
    return Bind(LEG, request(40, n=2), ticket(P), P.transports, P.host_id)


@pytest.mark.parametrize("answer", [Queued(LEG), NoRoom(LEG, 0, 1), Failed(LEG, Cause.DRAINING)])
@pytest.mark.parametrize("kind", [Submit, ComputeLocally])
def test_submitted_tokens_count_until_answered(
    kind: type[Submit | ComputeLocally], answer: LegMessage
) -> None:
    of = fleet()
    of.sent("p", kind(LEG, request(40)))
    assert worker(of, "p").queued_tokens == 40
    of.received("p", StepBatch((answer,), IDLE), 0.0)
    assert worker(of, "p").queued_tokens == 0


def test_bound_blocks_and_sequences_count_until_answered() -> None:
    of = fleet()
    of.sent("d", bind())
    assert worker(of, "d").free_blocks == 64 - 3 - 2
    assert worker(of, "d").num_sequences == 1
    of.received("d", StepBatch((Bound(LEG, 0),), IDLE), 0.0)
    assert worker(of, "d").free_blocks == 64


def test_an_aborted_bind_stops_counting() -> None:
    of = fleet()
    of.sent("d", bind())
    of.transfer_started(LEG, "p", "d", 1000)
    of.sent("d", Abort(LEG, 1))
    assert worker(of, "d").free_blocks < 64, "one choice less is still a leg"
    of.sent("d", Abort(LEG))
    assert worker(of, "d").free_blocks == 64
    assert of.link("p", "d").model.in_flight_bytes == 0


@pytest.mark.parametrize(
    ("answer", "num_transfers", "num_failures"),
    [
        (Imported(LEG, TransferStats("grpc", num_bytes=900, duration_ms=3.0)), 1, 0),
        (KvFailed(LEG, 0, Cause.TRANSPORT_FAILED), 0, 1),
        (Failed(LEG, Cause.STEP_FAILED), 0, 0),
        (NoRoom(LEG, 0, 1), 0, 0),
    ],
)
def test_a_transfer_is_in_flight_until_it_ends(
    answer: LegMessage, num_transfers: int, num_failures: int
) -> None:
    of = fleet()
    of.transfer_started(LEG, "p", "d", 1000)
    assert of.link("p", "d").model.in_flight_bytes == 1000
    of.received("d", StepBatch((answer,), IDLE), 0.0)
    assert of.link("p", "d").model.in_flight_bytes == 0
    views = of.view().links
    assert len(views) == num_transfers + num_failures
    if num_transfers:
        assert views[0].moved == {"grpc": Moved(1, 900, 0.003)}
    if num_failures:
        assert views[0].failures == {Cause.TRANSPORT_FAILED: 1}


def test_a_lost_worker_holds_nothing_and_can_be_forgotten() -> None:
    of = fleet()
    of.sent("d", bind())
    of.transfer_started(LEG, "p", "d", 1000)
    of.forget("d")
    assert worker(of, "d").state is WorkerState.UP, "only the lost are forgotten"
    of.lost("d")
    assert worker(of, "d").state is WorkerState.LOST
    assert not worker(of, "d").accepts
    assert worker(of, "d").free_blocks == 64
    assert of.link("p", "d").model.in_flight_bytes == 0
    of.forget("d")
    assert of.get("d") is None
    assert [view.worker_id for view in of.view().workers] == ["p"]


def test_what_was_learned_survives_a_lost_connection_but_not_a_restart() -> None:
    of = fleet()
    timing = StepTiming(100, 0, 0, 0, 10.0)
    of.received("p", StepBatch((), IDLE, timing), 0.0)
    of.lost("p")
    of.joined(P)
    assert worker(of, "p").latency.num_steps == 1
    of.joined(worker_info("p", Role.PREFILL, incarnation=2))
    assert worker(of, "p").latency.num_steps == 0


@pytest.mark.parametrize(
    ("age_ms", "queued_tokens", "is_stuck"),
    [(9_000, 0, False), (11_000, 0, True), (4_000, 4096, False)],
)
def test_progress_is_not_liveness(age_ms: float, queued_tokens: int, is_stuck: bool) -> None:
    of = fleet()
    snapshot = replace(IDLE, step_age_ms=age_ms, queued_prefill_tokens=queued_tokens)
    of.received("d", StepBatch((), snapshot), 0.0)
    assert (worker(of, "d").state is WorkerState.STUCK) == is_stuck
    of.received("d", StepBatch((), IDLE), 0.0)
    assert worker(of, "d").state is WorkerState.UP


def test_a_slow_step_is_not_a_stuck_one() -> None:
    of = fleet()
    for _ in range(20):
        of.received("p", StepBatch((), IDLE, StepTiming(512, 0, 0, 0, 4_000.0)), 0.0)
    busy = replace(IDLE, step_age_ms=15_000, queued_prefill_tokens=512)
    of.received("p", StepBatch((), busy), 0.0)
    assert worker(of, "p").state is WorkerState.UP


def test_draining_is_shown() -> None:
    of = fleet()
    of.received("d", StepBatch((), replace(IDLE, draining=True)), 0.0)
    assert not worker(of, "d").accepts
    assert worker(of, "d").view().state is WorkerState.DRAINING


def rates(*known: tuple[str, bool, float]) -> WorkerSnapshot:
    return replace(IDLE, link_rates=tuple(LinkRate(*rate) for rate in known))


def test_a_link_without_traffic_is_as_fast_as_the_worker_says_of_its_class() -> None:
    of = fleet()
    known = rates(("grpc", True, 123e6), ("grpc", False, 456e6), ("ucx", True, 789e6))
    of.received("d", StepBatch((), known), 0.0)
    is_same_host = P.host_id == D.host_id
    expected = 123e3 if is_same_host else 456e3
    assert of.link("p", "d").model.bytes_per_ms == expected  # both have grpc alone
    assert of.link("d", "p").model.bytes_per_ms == expected, "p says nothing, d does"
    of.received("d", StepBatch((), rates(("grpc", is_same_host, 99e6))), 0.0)
    assert of.link("p", "d").model.bytes_per_ms == 99e3
    of.transfer_started(LEG, "p", "d", 1 << 20)
    of.transfer_ended(LEG, TransferStats("grpc", 1 << 20, 1, 16, 1.0))
    of.received("d", StepBatch((), known), 0.0)
    assert of.link("p", "d").model.bytes_per_ms == 1 << 20, "what was measured counts"
