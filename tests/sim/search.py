"""Runs many schedules, over several processes, and sums up what they exercised."""

import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields

from tests.sim.fleet import SimFleet
from tests.sim.plan import Plan, Stats

_CHUNK = 100


@dataclass(slots=True)
class Result:
    failures: list[tuple[int, str]] = field(default_factory=list)  # (seed, what broke)
    stats: Stats = field(default_factory=Stats)

    def add(self, other: "Result") -> None:
        self.failures += other.failures
        for entry in fields(Stats):
            mine, theirs = getattr(self.stats, entry.name), getattr(other.stats, entry.name)
            setattr(self.stats, entry.name, mine + theirs)


def run_seeds(seeds: Sequence[int], plan: Plan | None = None) -> Result:
    """In this process."""
    logging.getLogger("baton.engine").setLevel(logging.CRITICAL)  # injected step faults are logged
    result = Result()
    for seed in seeds:
        try:
            result.add(Result([], SimFleet(seed, plan).run()))
        except AssertionError as error:
            result.failures.append((seed, str(error) or "an assertion without words"))
        except Exception as error:  # noqa: BLE001 - a crash of what is tested is a finding, too
            result.failures.append((seed, f"{type(error).__name__}: {error}"))
    return result


def search(seeds: Sequence[int], jobs: int, plan: Plan | None = None) -> Result:
    total = Result()
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    if jobs == 1:
        for chunk in chunks:
            total.add(run_seeds(chunk, plan))
        return total
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as executor:
        for result in executor.map(run_seeds, chunks, [plan] * len(chunks)):
            total.add(result)
    return total
