"""Fetch or compute, as tables: a fleet, who holds what, and what the target is told."""

from dataclasses import replace
from typing import Any

import pytest

from baton.gateway.prefix_plan import PrefixConfig, PrefixPlan, plan_prefix
from baton.gateway.router import Need, RouteDecision, RouterConfig, plan
from baton.gateway.workers import Fleet
from baton.types import FETCH_BY_HASH, Role, StepTiming, WorkerInfo
from tests.gateway.support import layout, worker_info

ABLE = frozenset({FETCH_BY_HASH})
LEN = 900
SLOW_MS, FAST_MS = 1.0, 0.001  # per token
TOKEN_BYTES = layout().token_bytes


def info(worker_id: str, role: Role = Role.PREFILL, **changes: Any) -> WorkerInfo:
    return replace(worker_info(worker_id, role), **{"capabilities": ABLE, **changes})


def fleet_of(*infos: WorkerInfo, ms_per_token: float = SLOW_MS) -> Fleet:
    fleet = Fleet()
    for one in infos:
        model = fleet.joined(one).latency
        for i in range(60):
            tokens = 64 + 32 * (i % 8)
            model.observe(StepTiming(tokens, 0, 0, 0, 1.0 + tokens * ms_per_token))
    return fleet


def planned(
    fleet: Fleet, hits: dict[str, int], config: PrefixConfig | None = None, cached: int = 0
) -> PrefixPlan | None:
    target = fleet.get("p")
    assert target is not None
    return plan_prefix(hits, LEN, cached, target, fleet, config or PrefixConfig())


@pytest.mark.parametrize(
    ("hits", "cached", "source", "num_tokens"),
    [
        ({}, 0, None, 0),
        ({"a": 512}, 0, "a", 512),
        ({"a": 512, "d": 768}, 0, "d", 768),  # a decode worker holds more
        ({"a": 512}, 512, None, 0),  # nothing that it lacks
        ({"a": 528}, 512, "a", 528),
        ({"a": 512, "p": 512}, 512, None, 0),
        ({"a": 5000}, 0, "a", 896),  # never the last token
        ({"gone": 512}, 0, None, 0),
    ],
)
def test_who_is_asked(
    hits: dict[str, int], cached: int, source: str | None, num_tokens: int
) -> None:
    fleet = fleet_of(info("p"), info("a"), info("d", Role.DECODE))
    found = planned(fleet, hits, PrefixConfig(margin_ms=0.0), cached)
    if source is None:
        assert found is None
        return
    assert found is not None
    assert (found.worker_id, found.num_tokens) == (source, num_tokens)
    assert found.num_bytes == (num_tokens - cached) * TOKEN_BYTES


def test_a_slow_or_busy_link_is_left_alone() -> None:
    fleet = fleet_of(info("p"), info("a"), info("b"))
    fast, hits = fleet.link("b", "p").model, {"a": 512, "b": 512}
    fleet.link("a", "p").model.bytes_per_ms = 1.0
    found = planned(fleet, hits)
    assert found is not None
    assert found.worker_id == "b"
    fast.started(int(fast.bytes_per_ms * 10_000))  # ten seconds are in its way
    assert planned(fleet, hits) is None


def test_fast_workers_compute() -> None:
    fleet = fleet_of(info("p"), info("a"), ms_per_token=FAST_MS)
    assert planned(fleet, {"a": 512}) is None
    found = planned(fleet, {"a": 512}, PrefixConfig(fetching="always"))
    assert found is not None
    assert found.saved_ms < PrefixConfig().margin_ms
    assert found.deadline_ms == 0  # nobody minds how long it takes


@pytest.mark.parametrize(
    "changes",
    [
        {"capabilities": frozenset()},
        {"fingerprint": b"x" * 32},
        {"protocol": (9, 0)},
    ],
    ids=str,
)
def test_who_cannot_be_asked(changes: dict[str, Any]) -> None:
    fleet = fleet_of(info("p"), info("a", **changes))
    assert planned(fleet, {"a": 512}, PrefixConfig(fetching="always")) is None


def test_off_is_off_and_a_draining_worker_is_left_alone() -> None:
    fleet = fleet_of(info("p"), info("a"))
    assert planned(fleet, {"a": 512}, PrefixConfig(fetching="off")) is None
    source = fleet.get("a")
    assert source is not None
    source.snapshot = replace(source.snapshot, draining=True)
    assert planned(fleet, {"a": 512}) is None


def test_the_deadline_is_when_computing_would_have_been_done() -> None:
    found = planned(fleet_of(info("p"), info("a")), {"a": 512})
    assert found is not None
    assert found.deadline_ms == pytest.approx(512 * SLOW_MS, rel=0.2)
    assert found.saved_ms == pytest.approx(found.deadline_ms - found.predicted_ms, abs=1.0)


def test_the_router_counts_on_it() -> None:
    """A free worker that fetches is better than a busy one that holds the prefix."""
    fleet = fleet_of(info("p"), info("a"), info("d", Role.DECODE))
    busy = fleet.get("a")
    assert busy is not None
    busy.snapshot = replace(busy.snapshot, queued_prefill_tokens=2_000)
    need = Need(LEN, max_new_tokens=2, hits={"a": 880})
    decision = plan(need, fleet, RouterConfig())
    assert isinstance(decision, RouteDecision)
    assert (decision.worker_id, decision.remote) == ("p", True)
    assert decision.prefix is not None
    assert decision.prefix.worker_id == "a"
    without = plan(need, fleet, RouterConfig(prefixes=PrefixConfig(fetching="off")))
    assert isinstance(without, RouteDecision)
    assert without.predicted_ttft_ms > decision.predicted_ttft_ms
