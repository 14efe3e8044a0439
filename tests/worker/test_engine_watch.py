from dataclasses import dataclass

import pytest

from baton.config import WorkerConfig
from baton.latency import LatencyModel, LatencyPrior
from baton.worker import engine as engine_module
from baton.worker.engine import MIN_STUCK_S, STUCK_FACTOR, StepWatch


@dataclass
class FakeEngine:
    is_alive: bool = True
    step_started_at: float | None = None


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: clock[0])
    return clock


def watch(engine: FakeEngine, latency: LatencyModel | None = None) -> StepWatch:
    config = WorkerConfig(max_num_batched_tokens=1000, max_num_seqs=10)
    return StepWatch(engine, latency or LatencyModel(), config)  # type: ignore[arg-type]


def test_between_steps_all_is_well(now: list[float]) -> None:
    assert watch(FakeEngine()).is_well


def test_a_dead_engine_is_not_well() -> None:
    assert not watch(FakeEngine(is_alive=False)).is_well


def test_a_step_that_does_not_end_turns_red_and_green_again(now: list[float]) -> None:
    engine = FakeEngine(step_started_at=1000.0)
    watching = watch(engine)
    now[0] += MIN_STUCK_S
    assert watching.is_well
    now[0] += 0.1
    assert not watching.is_well
    engine.step_started_at = None
    assert watching.is_well


def test_a_slow_worker_has_more_time(now: list[float]) -> None:
    """4 s for the largest prefill step is slow, not stuck."""
    prior = LatencyPrior(coefficients=(0.0, 4.0, 0.0, 0.0, 0.0))
    engine = FakeEngine(step_started_at=1000.0)
    watching = watch(engine, LatencyModel(prior))
    assert watching.limit_s == pytest.approx(STUCK_FACTOR * 4.0, rel=0.01)
    now[0] += 15.0
    assert watching.is_well
