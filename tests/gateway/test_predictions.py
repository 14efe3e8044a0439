"""Predictions of what was not seen for long: who was slow once is tried again, and rarely."""

import random
from dataclasses import replace

import pytest

from baton.errors import Cause
from baton.gateway.router import (
    DecodeDecision,
    Need,
    RouteDecision,
    RouterConfig,
    pick_decode,
    plan,
)
from baton.gateway.workers import Fleet
from baton.latency import HALF_LIFE_MS, LatencyModel
from baton.messages import KvFailed, StepBatch
from baton.types import LegId, LinkRate, Role, StepTiming, TransferStats
from tests.gateway.support import fleet_of, worker, worker_info

CONFIG = RouterConfig()
NEED = Need(prompt_len=400, max_new_tokens=32)
PREFILL = StepTiming(400, 0, 0, 0)
DECODE = StepTiming(0, 0, 4, 1600)
P1, P2 = worker_info("p1", Role.PREFILL), worker_info("p2", Role.PREFILL)
D1, D2 = worker_info("d1", Role.DECODE), worker_info("d2", Role.DECODE)


def seen(fleet: Fleet, worker_id: str, work: StepTiming, ms: float, now_ms: float) -> None:
    """Steps of some times this work, each time in so many ms; all end now."""
    snapshot = worker(fleet, worker_id).snapshot
    for times in (0.25, 0.5, 1.0, 2.0) * 8:
        step = StepTiming(
            int(work.num_prefill_tokens * times),
            0,
            int(work.num_decodes * times),
            int(work.context_tokens * times),
            ms * times,
        )
        fleet.received(worker_id, StepBatch((), snapshot, step), now_ms)


def producer(fleet: Fleet, need: Need = NEED) -> str:
    decision = plan(need, fleet, CONFIG)
    assert isinstance(decision, RouteDecision)
    assert decision.remote
    return decision.worker_id


def consumer(fleet: Fleet) -> str:
    decision = pick_decode(NEED, worker(fleet, "p1"), fleet, CONFIG)
    assert isinstance(decision, DecodeDecision)
    return decision.worker_id


CASES = [  # how many times slower it was, half-lives without it, is it tried?
    (1.1, 1.0, False),  # equals take turns, but not faster than this
    (1.1, 1.5, True),
    (2, 2.3, False),
    (2, 2.9, True),  # 1 + log2(3)
    (20, 5.8, False),
    (20, 6.8, True),  # 1 + log2(39)
]


@pytest.mark.parametrize(("times", "half_lives", "is_tried"), CASES)
def test_a_prefill_worker_that_was_slow_is_tried_again(
    times: float, half_lives: float, is_tried: bool
) -> None:
    fleet = fleet_of(P1, P2, D1)
    seen(fleet, "p1", PREFILL, 100.0, 0.0)
    seen(fleet, "p2", PREFILL, 100.0 * times, 0.0)
    seen(fleet, "p1", PREFILL, 100.0, HALF_LIFE_MS * half_lives)
    assert producer(fleet) == ("p2" if is_tried else "p1")


@pytest.mark.parametrize(("times", "half_lives", "is_tried"), CASES)
def test_a_decode_worker_that_was_slow_is_tried_again(
    times: float, half_lives: float, is_tried: bool
) -> None:
    fleet = fleet_of(P1, D1, D2)
    fleet.link("p1", "d1").model.bytes_per_ms = fleet.link("p1", "d2").model.bytes_per_ms = 1e9
    seen(fleet, "d1", DECODE, 100.0, 0.0)
    seen(fleet, "d2", DECODE, 100.0 * times, 0.0)
    seen(fleet, "d1", DECODE, 100.0, HALF_LIFE_MS * half_lives)
    assert consumer(fleet) == ("d2" if is_tried else "d1")


def test_one_at_a_time_tries_it() -> None:
    fleet = fleet_of(P1, P2, D1)
    seen(fleet, "p1", PREFILL, 100.0, 0.0)
    seen(fleet, "p2", PREFILL, 2_000.0, 0.0)
    seen(fleet, "p1", PREFILL, 100.0, 50 * HALF_LIFE_MS)
    assert producer(fleet) == "p2"
    p2 = worker(fleet, "p2")
    p2.snapshot = replace(p2.snapshot, queued_prefill_tokens=1)
    assert producer(fleet) == "p1"


def test_who_was_never_seen_is_tried_at_once() -> None:
    fleet = fleet_of(P1, P2, D1)
    seen(fleet, "p1", PREFILL, 100.0, 0.0)
    assert producer(fleet) == "p2"


def test_a_fleet_at_rest_forgets_nothing() -> None:
    """Only that others are seen at work makes an estimate old."""
    fleet = fleet_of(P1, P2, D1)
    seen(fleet, "p1", PREFILL, 100.0, 0.0)
    seen(fleet, "p2", PREFILL, 110.0, 0.0)
    before = plan(NEED, fleet, CONFIG)
    for info in (D1, P1, P2):  # heartbeats, much later
        fleet.received(info.worker_id, StepBatch((), worker(fleet, info.worker_id).snapshot), 1e9)
    assert plan(NEED, fleet, CONFIG) == before


def test_a_long_prefix_is_not_left_for_a_hope() -> None:
    fleet = fleet_of(P1, P2, D1)
    for of in ("p1", "p2"):
        seen(fleet, of, PREFILL, 100.0, 0.0)
    seen(fleet, "p1", PREFILL, 100.0, 50 * HALF_LIFE_MS)
    assert producer(fleet) == "p2"
    assert producer(fleet, replace(NEED, hits={"p1": 320})) == "p1"


def test_one_request_shows_that_it_is_fast_again() -> None:
    model = LatencyModel()
    rng = random.Random(0)
    for _ in range(60):
        model.observe(StepTiming(rng.randrange(64, 512), 0, 0, 0, 2_000.0))
    model.age(10 * HALF_LIFE_MS)
    assert model.prefill_ms(400) > 1_500.0, "nothing is forgotten for nothing"
    model.observe(StepTiming(400, 0, 0, 0, 100.0))
    assert model.prefill_ms(400) < 200.0


def test_steps_in_a_row_are_not_aged() -> None:
    fleet = fleet_of(P1)
    seen(fleet, "p1", PREFILL, 100.0, 0.0)
    evidence = worker(fleet, "p1").latency.evidence
    assert evidence > 10
    seen(fleet, "p1", PREFILL, 100.0, 10 * HALF_LIFE_MS)
    assert worker(fleet, "p1").latency.evidence > 10, "the gap counts once"


def test_a_link_that_stalled_is_predicted_to_be_slower() -> None:
    fleet = fleet_of(P1, P2, D1)
    link_used(fleet, "p1", 200, 0.0)
    before_ms = fleet.transfer_ms("p1", "d1", 1 << 24)
    fleet.transfer_started(LegId("p1", 2), "p1", "d1", 1 << 24)
    stalled = KvFailed(LegId("p1", 2), 0, Cause.TRANSFER_STALLED, "")
    fleet.received("d1", StepBatch((stalled,), worker(fleet, "d1").snapshot), 1.0)
    assert fleet.transfer_ms("p1", "d1", 1 << 24) > 3 * before_ms
    assert fleet.link("p1", "d1").view().num_failures == 1


def link_used(fleet: Fleet, source: str, megabytes_s: float, now_ms: float) -> None:
    leg = LegId(source, 1)
    num_bytes = 1 << 20
    fleet.transfer_started(leg, source, "d1", num_bytes)
    ms = num_bytes / (megabytes_s * 1e3)
    stats = TransferStats("grpc", num_bytes, 1, 16, ms, num_bytes, ms)
    fleet.transfer_ended(leg, stats, now_ms=now_ms)


def test_a_link_that_was_slow_is_like_its_class_again_after_a_while() -> None:
    fleet = fleet_of(P1, P2, D1)
    rate = LinkRate("grpc", P1.host_id == D1.host_id, 200e6)
    d1 = worker(fleet, "d1")
    fleet.received("d1", StepBatch((), replace(d1.snapshot, link_rates=(rate,))), 0.0)
    link_used(fleet, "p1", 200, 0.0)
    link_used(fleet, "p2", 1, 0.0)
    slow_ms = fleet.transfer_ms("p2", "d1", 1 << 20)
    assert slow_ms > 1_000.0
    link_used(fleet, "p1", 200, HALF_LIFE_MS)
    assert fleet.transfer_ms("p2", "d1", 1 << 20) == slow_ms
    link_used(fleet, "p1", 200, 10 * HALF_LIFE_MS)
    assert fleet.transfer_ms("p2", "d1", 1 << 20) < 10.0
    assert fleet.link("p2", "d1").view().bytes_per_s < 2e6, "shown is what was measured"
    link_used(fleet, "p2", 1, 10 * HALF_LIFE_MS)
    assert fleet.transfer_ms("p2", "d1", 1 << 20) > 500.0
