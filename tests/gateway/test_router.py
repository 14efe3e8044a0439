"""Routing as tables: a fleet, a need, and who must be chosen."""

from dataclasses import replace
from typing import Any

import pytest

from baton.errors import Cause
from baton.gateway.backend import WorkerState
from baton.gateway.router import (
    DecodeDecision,
    Need,
    Refusal,
    RouteDecision,
    RouterConfig,
    pick_decode,
    plan,
)
from baton.gateway.workers import Fleet
from baton.types import Role, StepTiming, WorkerInfo
from tests.gateway.support import fleet_of, layout, worker, worker_info

CONFIG = RouterConfig()


def load(fleet: Fleet, worker_id: str, **changes: object) -> None:
    target = worker(fleet, worker_id)
    target.snapshot = replace(target.snapshot, **changes)  # type: ignore[arg-type]


def learn(fleet: Fleet, worker_id: str, ms_per_token: float) -> None:
    model = worker(fleet, worker_id).latency
    for i in range(60):
        tokens = 64 + 32 * (i % 8)
        model.observe(StepTiming(tokens, 0, 0, 0, 1.0 + tokens * ms_per_token))


def chosen(need: Need, fleet: Fleet, config: RouterConfig = CONFIG) -> RouteDecision:
    decision = plan(need, fleet, config)
    assert isinstance(decision, RouteDecision), decision
    return decision


def refused(need: Need, fleet: Fleet) -> Cause:
    decision = plan(need, fleet, CONFIG)
    assert isinstance(decision, Refusal), decision
    return decision.cause


def prefill(worker_id: str, **options: object) -> WorkerInfo:
    return worker_info(worker_id, Role.PREFILL, **options)  # type: ignore[arg-type]


def decode(worker_id: str, **options: object) -> WorkerInfo:
    return worker_info(worker_id, Role.DECODE, **options)  # type: ignore[arg-type]


NEED = Need(prompt_len=400, max_new_tokens=32)


def test_idle_fleet_goes_remote_and_ties_are_stable() -> None:
    fleet = fleet_of(prefill("p2"), prefill("p1"), decode("d2"), decode("d1"))
    for _ in range(3):
        decision = chosen(NEED, fleet)
        assert decision.remote
        assert (decision.worker_id, decision.decode_worker_id) == ("p1", "d1")


@pytest.mark.parametrize(
    ("queue_p1", "hits", "expected"),
    [
        (0, {}, "p1"),
        (2000, {}, "p2"),
        (0, {"p2": 320}, "p2"),  # the prefix decides between equal queues
        (0, {"p1": 320}, "p1"),
        (100, {"p1": 320}, "p1"),  # a short queue is worth a long prefix
        (4000, {"p1": 320}, "p2"),  # a long one is not: locality is no filter
    ],
)
def test_prefill_worker_by_predicted_time(
    queue_p1: int, hits: dict[str, int], expected: str
) -> None:
    fleet = fleet_of(prefill("p1"), prefill("p2"), decode("d1"))
    load(fleet, "p1", queued_prefill_tokens=queue_p1)
    decision = chosen(replace(NEED, hits=hits), fleet)
    assert decision.worker_id == expected
    assert decision.num_cached_tokens == hits.get(expected, 0)


def test_what_was_sent_counts_before_the_worker_says_so() -> None:
    from baton.messages import Submit
    from baton.types import LegId
    from tests.gateway.support import request

    fleet = fleet_of(prefill("p1"), prefill("p2"), decode("d1"))
    fleet.sent("p1", Submit(LegId("a", 1), request(400)))
    assert chosen(NEED, fleet).worker_id == "p2"


def test_the_slower_machine_gets_less() -> None:
    fleet = fleet_of(prefill("p1"), prefill("p2"), decode("d1"))
    learn(fleet, "p1", 1.0)
    learn(fleet, "p2", 0.1)
    assert chosen(NEED, fleet).worker_id == "p2"
    load(fleet, "p2", queued_prefill_tokens=8000)
    assert chosen(NEED, fleet).worker_id == "p1"


def test_a_slow_link_counts() -> None:
    fleet = fleet_of(prefill("p1"), prefill("p2"), decode("d1"))
    fleet.link("p1", "d1").model.bytes_per_ms = 1000.0
    assert chosen(NEED, fleet).worker_id == "p2"
    fleet.link("p2", "d1").model.started(10**9)
    assert chosen(NEED, fleet).worker_id == "p1"


@pytest.mark.parametrize(
    ("what", "is_local"),
    [
        ("idle", False),
        ("p is busy", True),
        ("d has it cached", True),
        ("p is busy, d has no room", False),
        ("p is busy, d too", False),
        ("p is busy, d's sequences would miss their TPOT", False),
        ("p is busy, d's sequences keep their TPOT", True),
        ("the link is slow", True),
        ("the link is slow within one TPOT", False),
        ("p is busy, but local prefill is a fallback only", False),
    ],
)
def test_local_prefill_on_d(what: str, is_local: bool) -> None:
    fleet = fleet_of(prefill("p1"), decode("d1"))
    learn(fleet, "p1", 0.25)  # 100 ms for the prompt; d1 is taken to be as fast
    need = NEED
    config = RouterConfig(slo_tpot_ms=50)
    if "p is busy" in what:
        load(fleet, "p1", queued_prefill_tokens=4000)
    if what == "d has it cached":
        need = replace(need, hits={"d1": 384})
    if "d has no room" in what:
        load(fleet, "d1", free_blocks=20)
    if "d too" in what:
        load(fleet, "d1", queued_prefill_tokens=4000)
    if "TPOT" in what and "sequences" in what:
        load(fleet, "d1", num_running=4, context_tokens=1000)
        config = RouterConfig(slo_tpot_ms=50 if "miss" in what else 500)
    if "fallback" in what:
        config = RouterConfig(slo_tpot_ms=50, prefers_faster_local=False)
    if "link is slow" in what:
        rate = 10 if "within" not in what else 102_400 / 40
        fleet.link("p1", "d1").model.bytes_per_ms = rate
    assert chosen(need, fleet, config).remote is not is_local


@pytest.mark.parametrize(
    ("num_seen", "num_steps", "is_remote"),
    [(1, 0, True), (3, 4, True), (3, 15, True), (3, 16, False)],
)
def test_a_few_prompts_on_d_do_not_make_it_the_faster_one(
    num_seen: int, num_steps: int, is_remote: bool
) -> None:
    """Nor does a first prompt that took long on P."""
    fleet = fleet_of(prefill("p1"), decode("d1"))
    slow, fast = worker(fleet, "p1").latency, worker(fleet, "d1").latency
    for _ in range(slow.num_warmup + num_seen):
        slow.observe(StepTiming(2, 0, 0, 0, 15.0))
    for _ in range(fast.num_warmup):
        fast.observe(StepTiming(0, 0, 1, 2, 5.0))
    for _ in range(num_steps):
        fast.observe(StepTiming(2, 0, 0, 0, 5.0))
    need = replace(NEED, prompt_len=2)
    assert chosen(need, fleet, RouterConfig(slo_tpot_ms=50)).remote is is_remote


def test_no_prefill_worker_prefills_on_d() -> None:
    fleet = fleet_of(prefill("p1"), decode("d1"), decode("d2"))
    fleet.lost("p1")
    load(fleet, "d1", queued_prefill_tokens=1000)
    decision = chosen(NEED, fleet)
    assert (decision.remote, decision.worker_id) == (False, "d2")


def test_no_decode_worker_decodes_on_p() -> None:
    fleet = fleet_of(prefill("p1"), decode("d1"))
    fleet.lost("d1")
    decision = chosen(NEED, fleet)
    assert (decision.remote, decision.worker_id) == (False, "p1")


def test_a_full_decode_worker_does_not_stop_the_prefill() -> None:
    fleet = fleet_of(prefill("p1"), decode("d1"))
    decision = chosen(replace(NEED, avoid=frozenset({"d1"})), fleet)
    assert (decision.remote, decision.worker_id) == (True, "p1")


def test_aggregated_worker_computes_alone() -> None:
    decision = chosen(NEED, fleet_of(worker_info("w1"), worker_info("w2")))
    assert (decision.remote, decision.worker_id) == (False, "w1")


INCOMPATIBLE: dict[str, dict[str, Any]] = {
    "fingerprint": {"fingerprint": b"other"},
    "layout": {"kv_layout": layout(num_layers=3)},
    "dtype": {"kv_layout": layout(dtype="bfloat16")},
    "protocol": {"protocol": (2, 0)},
}


@pytest.mark.parametrize("why", INCOMPATIBLE)
def test_incompatible_pairs_are_never_chosen(why: str) -> None:
    fleet = fleet_of(prefill("p1"), decode("d1", **INCOMPATIBLE[why]), decode("d2"))
    load(fleet, "d2", num_running=12, context_tokens=10_000)
    decision = chosen(NEED, fleet)
    if decision.remote:
        assert decision.decode_worker_id == "d2"
    bound = pick_decode(NEED, worker(fleet, "p1"), fleet, CONFIG)
    assert isinstance(bound, DecodeDecision)
    assert bound.worker_id == "d2"
    fleet.lost("d2")
    assert not chosen(NEED, fleet).remote


def test_block_sizes_may_differ() -> None:
    fleet = fleet_of(prefill("p1"), decode("d1", kv_layout=layout(block_size=32)))
    assert chosen(NEED, fleet).remote


def test_a_started_request_stays_with_its_model_version() -> None:
    fleet = fleet_of(worker_info("new", fingerprint=b"new"), worker_info("old"))
    load(fleet, "old", queued_prefill_tokens=10_000)
    assert chosen(NEED, fleet).worker_id == "new"
    pinned = replace(NEED, fingerprint=worker(fleet, "old").info.fingerprint)
    assert chosen(pinned, fleet).worker_id == "old"


@pytest.mark.parametrize("state", [WorkerState.LOST, WorkerState.STUCK, "draining"])
def test_the_dead_and_the_draining_get_nothing(state: WorkerState | str) -> None:
    fleet = fleet_of(prefill("p1"), prefill("p2"), decode("d1"), decode("d2"))
    for worker_id in ("p1", "d1"):
        if isinstance(state, WorkerState):
            worker(fleet, worker_id).state = state
        else:
            load(fleet, worker_id, draining=True)
    decision = chosen(NEED, fleet)
    assert (decision.worker_id, decision.decode_worker_id) == ("p2", "d2")
    bound = pick_decode(NEED, worker(fleet, "p2"), fleet, CONFIG)
    assert isinstance(bound, DecodeDecision)
    assert bound.worker_id == "d2"


def test_refusals() -> None:
    assert refused(NEED, fleet_of()) is Cause.NO_WORKER
    assert refused(NEED, fleet_of(worker_info("w", num_blocks=4))) is Cause.NEVER_FITS
    fleet = fleet_of(worker_info("w"))
    assert refused(replace(NEED, avoid=frozenset({"w"})), fleet) is Cause.NO_ROOM
    load(fleet, "w", draining=True)
    assert refused(NEED, fleet) is Cause.DRAINING


@pytest.mark.parametrize("how", ["lost", "draining"])
def test_never_is_not_said_of_a_request_that_fits_a_worker_out_of_reach(how: str) -> None:
    fleet = fleet_of(worker_info("a", num_blocks=4), worker_info("b"))
    if how == "lost":
        fleet.lost("b")
    else:
        load(fleet, "b", draining=True)
    assert refused(NEED, fleet) is Cause.NO_WORKER


def test_choices_that_do_not_fit_at_once_take_turns_where_they_are_computed() -> None:
    need = replace(NEED, prompt_len=20, num_choices=3, num_output_tokens=40, total_len=80)
    fleet = fleet_of(prefill("p"), replace(decode("d"), num_blocks=10))
    target = worker(fleet, "d")
    assert need.whole_on(target) < 10 < need.bound_on(target)
    decision = chosen(need, fleet)
    assert (decision.worker_id, decision.remote) == ("d", False)
    picked = pick_decode(need, worker(fleet, "p"), fleet, CONFIG)
    assert isinstance(picked, Refusal)
    assert picked.cause is Cause.NO_WORKER
    small = fleet_of(replace(prefill("p"), num_blocks=3), replace(decode("d"), num_blocks=10))
    picked = pick_decode(need, worker(small, "p"), small, CONFIG)
    assert isinstance(picked, Refusal)
    assert picked.cause is Cause.NEVER_FITS, "not on the producer either"


def test_a_small_worker_is_passed_over() -> None:
    fleet = fleet_of(worker_info("a", num_blocks=4), worker_info("b"))
    assert chosen(NEED, fleet).worker_id == "b"


@pytest.mark.parametrize(
    ("d1", "d2", "expected"),
    [
        ({}, {}, "d1"),
        ({"free_blocks": 40}, {"free_blocks": 50}, "d2"),  # equal steps: more free blocks
        ({"num_running": 8, "context_tokens": 4000}, {}, "d2"),
        ({"free_blocks": 20}, {"num_running": 8, "context_tokens": 4000}, "d2"),  # must have room
        ({"num_running": 16}, {"num_running": 12}, "d2"),  # max_num_seqs
    ],
)
def test_decode_worker(d1: dict[str, int], d2: dict[str, int], expected: str) -> None:
    fleet = fleet_of(prefill("p1"), decode("d1"), decode("d2"))
    load(fleet, "d1", **d1)
    load(fleet, "d2", **d2)
    decision = pick_decode(NEED, worker(fleet, "p1"), fleet, CONFIG)
    assert isinstance(decision, DecodeDecision)
    assert decision.worker_id == expected


def test_decode_worker_by_what_it_has_cached() -> None:
    fleet = fleet_of(prefill("p1"), decode("d1"), decode("d2"))
    need = replace(NEED, hits={"d2": 384})
    for target in ("d1", "d2"):
        fleet.link("p1", target).model.bytes_per_ms = 500.0
    decision = pick_decode(need, worker(fleet, "p1"), fleet, CONFIG)
    assert isinstance(decision, DecodeDecision)
    assert (decision.worker_id, decision.num_cached_tokens) == ("d2", 384)
    assert decision.num_bytes == 16 * layout().token_bytes


def test_no_room_is_not_no_worker() -> None:
    fleet = fleet_of(prefill("p1"), decode("d1"))
    source = worker(fleet, "p1")
    load(fleet, "d1", free_blocks=0)
    full = pick_decode(NEED, source, fleet, CONFIG)
    assert isinstance(full, Refusal)
    assert full.cause is Cause.NO_ROOM
    fleet.lost("d1")
    none = pick_decode(NEED, source, fleet, CONFIG)
    assert isinstance(none, Refusal)
    assert none.cause is Cause.NO_WORKER


def test_need_counts_blocks() -> None:
    (w,) = fleet_of(worker_info("w"))
    assert Need(prompt_len=16).blocks_on(w) == 2
    assert Need(prompt_len=17, num_choices=4).blocks_on(w) == 6
    assert Need(prompt_len=16, num_output_tokens=17, num_choices=2).blocks_on(w) == 1 + 2 * 3
    assert Need(prompt_len=64, hits={"w": 64}).cached_on(w) == 48, "the last token is computed"
