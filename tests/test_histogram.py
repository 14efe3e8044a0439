"""LoopHistogram exposes what prometheus_client's histogram does."""

import random

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from baton.histogram import LoopHistogram

BOUNDS = (0.001, 0.0025, 0.1, 1.0, 60.0)


def exposed(registry: CollectorRegistry) -> list[str]:
    text = generate_latest(registry).decode()
    return [line for line in text.splitlines() if "_created" not in line]


@pytest.mark.parametrize("label_names", [(), ("model_name", "engine")])
@pytest.mark.parametrize("num_values", [0, 300])
def test_as_the_librarys(label_names: tuple[str, ...], num_values: int) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = LoopHistogram("x:itl_seconds", "ITL.", label_names, buckets=BOUNDS, registry=ours)
    other = Histogram("x:itl_seconds", "ITL.", label_names, buckets=BOUNDS, registry=theirs)
    rng = random.Random(0)
    for number in range(num_values):
        value = rng.choice([*BOUNDS, 0.0, 70.0, rng.lognormvariate(-3, 3)])
        labels = (f"m{number % 2}", "0") if label_names else ()
        mine.observe(value, labels)
        (other.labels(*labels) if labels else other).observe(value)
    assert exposed(ours) == exposed(theirs)


def test_a_name_is_taken_once() -> None:
    registry = CollectorRegistry()
    LoopHistogram("itl", "ITL.", (), buckets=BOUNDS, registry=registry)
    with pytest.raises(ValueError, match="itl"):
        Histogram("itl", "ITL.", registry=registry)
