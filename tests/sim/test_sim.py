"""Seeded schedules of a whole fleet; see `python -m tests.sim --help` for replaying one."""

import pytest

from baton.gateway.request_machine import RequestMachine
from tests.sim.fleet import SimFleet
from tests.sim.mutations import MUTATIONS
from tests.sim.plan import CALM, RESTLESS, STEPS, Plan
from tests.sim.search import Result, run_seeds, search

JOBS = 2


def explain(result: Result) -> str:
    lines = [f"python -m tests.sim --seed {seed}: {error}" for seed, error in result.failures]
    return "\n".join([f"{len(lines)} failures", *lines[:10]])


def check_exercised(result: Result) -> None:
    """What never happens proves nothing."""
    stats = result.stats
    assert not result.failures, explain(result)
    assert stats.num_imports > 0
    assert stats.num_bytes > 0
    assert stats.num_early_frames > 0
    assert stats.num_prefixes > 0
    assert stats.num_cached_tokens > 0
    assert stats.num_failed_fetches > 0
    assert stats.num_corrupted > 0
    kinds = "Submit Bind Rebind ComputeLocally Abort Release Queued Admitted Progress NoRoom Bound"
    kinds += " Imported KvFailed Failed LeaseLost TokenChunk"
    assert not set(kinds.split()) - set(stats.messages)
    faults = "crash pause cut corrupt raise evict drain gateway step"
    faults += " flip truncate lose duplicate swap replay"
    assert not set(faults.split()) - set(stats.faults)
    events = "opened attached reattached done retained pinned_again expired evicted failed released"
    assert not set(events.split()) - set(stats.leases), stats.leases
    served = stats.outcomes["ok"] / stats.outcomes.total()
    assert served > 0.7, stats.outcomes


@pytest.mark.timeout(900)
def test_schedules_with_faults() -> None:
    check_exercised(search(range(500), JOBS))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_schedules_with_faults() -> None:
    check_exercised(search(range(10_000), JOBS))


@pytest.mark.parametrize("how", ["crash", "pause"])
@pytest.mark.parametrize("step", STEPS)
def test_each_side_is_struck_at_every_step(step: str, how: str) -> None:
    """Whoever passes it first: over the schedules that is each worker, or a gateway."""
    plan = Plan(strike=(step, how))
    struck = 0
    for first in range(0, 400, 4):
        result = run_seeds(range(first, first + 4), plan)
        assert not result.failures, explain(result)
        struck += result.stats.steps[f"{how} at {step}"]
        if struck >= 4:
            return
    raise AssertionError(f"struck only {struck} times at {step}")


def test_calm_schedules_waste_nothing() -> None:
    result = run_seeds(range(120), CALM)
    assert not result.failures, explain(result)
    assert set(result.stats.outcomes) == {"ok"}
    assert result.stats.num_imports > 100


def test_a_schedule_replays_exactly() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        SimFleet(8, trace=trace.append).run()
    assert traces[0] == traces[1]
    assert len(traces[0]) > 20


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_product_is_found(name: str) -> None:
    mutation = MUTATIONS[name]
    for first in range(0, 400, 20):
        for plan in (CALM, Plan(num_corrupt=1), RESTLESS):
            with mutation():
                failures = run_seeds(range(first, first + 20), plan).failures
            if failures:
                sound = run_seeds([seed for seed, _ in failures[:3]], plan)
                assert not sound.failures, "they fail without it, too"
                return
    raise AssertionError(f"{name} went unnoticed")


def test_a_request_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator notices silence: a gateway that ignores the loss of workers."""
    monkeypatch.setattr(RequestMachine, "on_worker_lost", lambda *_: [])
    result = run_seeds(range(60))
    assert any("never ends" in error or "leaks" in error for _, error in result.failures), explain(
        result
    )
