"""Requests that change their decode worker all the time, whatever breaks meanwhile."""

import pytest

from tests.sim.plan import RESTLESS, Plan
from tests.sim.search import run_seeds, search
from tests.sim.test_sim import JOBS, explain

PREPARING = ["Submit", "Queued", "Admitted"]
MOVING = ["Bind", "Bound", "Imported", "TokenChunk", "ComputeLocally", "Release"]
CASES = [(step, "source") for step in [*PREPARING, *MOVING]] + [(s, "target") for s in MOVING]


@pytest.mark.timeout(900)
def test_restless_schedules_with_faults() -> None:
    result = search(range(1000, 1200), JOBS, RESTLESS)
    assert not result.failures, explain(result)
    stats = result.stats
    assert stats.num_migrated_bytes > 0
    ends = "rebalance moved,rebalance failed,rebalance moot,drain moved"
    ends += ",failure attached,failure recomputed"
    assert not set(ends.split(",")) - set(stats.migrations), stats.migrations
    assert stats.migrations["rebalance moved"] > 100


@pytest.mark.parametrize("how", ["crash", "cut", "pause"])
@pytest.mark.parametrize(("step", "who"), CASES)
def test_either_worker_is_lost_at_any_step(step: str, who: str, how: str) -> None:
    result = run_seeds(range(6), Plan(is_restless=True, move_strike=(step, who, how)))
    assert not result.failures, explain(result)
    assert result.stats.num_strikes > 2
    assert set(result.stats.outcomes) <= {"ok", "CANCELLED", "DEADLINE_EXCEEDED"}
