"""`kill -9` and SIGSTOP of a worker at every numbered step of a request, by named failpoints: no
wrong token, no error that another worker could have spared, no leak, no long silence; and a worker
that comes back has let go of everything, too."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import psutil
import pytest
from harness import bearable_silence_s, slowed, wait_until

from baton import SamplingParams

BODY = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 3, "max_tokens": 24}
BODY |= {"ignore_eos": True, "n": 2}
PROMPT_LEN = 300  # three chunks of prefill
MAX_ROUNDS = 8  # until the armed worker has been chosen and is struck
LEASE_S = 30.0  # baton.config: lease_ms

# What baton.failpoints names, in the order of a request; a step may also run anywhere between them.
STEPS = {
    "prefill": (
        *("submit", "admitted", "engine-step", "progress", "attach", "frame-sent"),
        *("sampled", "done", "release"),
    ),
    "decode": ("bind", "bound", "frame", "fetched", "imported", "engine-step", "token"),
}
QUICK = ("prefill", "frame-sent")

pytestmark = pytest.mark.timeout(600)


class Served:
    """A fleet with two workers of a role, one of which, the victim, has failpoints."""

    def __init__(self, fleet: Any, oracle: Any) -> None:
        self.fleet = fleet
        self._oracle = oracle
        self._seeds = count(13, 13)  # every prompt is new to every worker
        self._usual_silence_s = 0.0

    def start_victim(self, role: str, names: tuple[str, ...], how: str) -> str:
        victim = f"{role}-0"
        if victim in self.fleet.processes:
            self.fleet.kill(victim)
        route = f"{victim} → decode-1" if role == "prefill" else f"prefill-1 → {victim}"
        specs = ",".join(f"{name}:+1={how}" for name in names)
        with self.fleet.expect_log("gateway", f"route {route} is proven"):
            self.fleet.start_worker(victim, BATON_FAILPOINT=specs, BATON_TEST_HOOKS="true")
            self.fleet.wait_workers(victim, "prefill-1", "decode-1")
        # A loaded machine is slow when nothing happens as well.
        self._usual_silence_s = self._serve()
        return victim

    def strike(self, victim: str, is_struck: Callable[[], bool]) -> None:
        """Serve until the next failpoint of the victim has struck."""
        self._prefer(victim)
        os.kill(self.fleet.pid(victim), signal.SIGUSR1)
        for number in range(MAX_ROUNDS):
            if number and number % 2 == 0:
                self._prefer(victim)  # the other one was still the faster
                if is_struck():
                    return
            silence_s = self._serve()
            print(f"silence {silence_s:.2f} s, usually {self._usual_silence_s:.2f} s")
            assert silence_s < bearable_silence_s(3 * self._usual_silence_s)
            try:
                wait_until(is_struck, 1.0, "struck")  # the last just after the client's answer
            except AssertionError:
                continue
            return
        raise AssertionError("the failpoint was never passed")

    def _prefer(self, victim: str) -> None:
        """From now on the victim is predicted to be the faster one."""
        with slowed(self.fleet.pid(victim.replace("-0", "-1")), 0.3):
            self._serve()

    def _serve(self) -> float:
        """Two at once: whichever worker is predicted to be faster, the other one gets work as well.
        Returns the longest silence of both."""
        prompts = [self._prompt(), self._prompt()]
        with ThreadPoolExecutor(len(prompts)) as pool:
            results = list(
                pool.map(lambda ids: self.fleet.complete({"prompt": ids, **BODY}), prompts)
            )
        for tokens, result in zip(prompts, results, strict=True):
            assert result.error is None
            assert result.done
            assert result.token_ids == self._oracle(tokens, SamplingParams(**BODY))
        return max(result.longest_silence_s for result in results)

    def _prompt(self) -> list[int]:
        seed = next(self._seeds)
        return [(seed + i * 29 + i * i * 3) % 1900 + 20 for i in range(PROMPT_LEN)]


@pytest.fixture(scope="module")
def served(make_fleet, oracle) -> Iterator[Served]:
    with make_fleet("prefill-1", "decode-1") as fleet:
        fleet.wait_workers("prefill-1", "decode-1")
        yield Served(fleet, oracle)


def each_step() -> Iterator[Any]:
    for role, names in STEPS.items():
        for name in names:
            marks = () if (role, name) == QUICK else (pytest.mark.slow,)
            yield pytest.param(role, name, marks=marks, id=f"{role}-{name}")


@pytest.mark.parametrize(("role", "name"), list(each_step()))
def test_a_worker_is_killed_there(served: Served, role: str, name: str) -> None:
    fleet = served.fleet
    victim = served.start_victim(role, (name,), "kill")
    served.strike(victim, lambda: fleet.processes[victim].poll() is not None)
    fleet.kill(victim)
    fleet.assert_no_leak(LEASE_S)


@pytest.mark.parametrize(
    ("role", "names"),
    [
        pytest.param("decode", ("imported",), id="decode-imported"),
        *(
            pytest.param(role, names, marks=pytest.mark.slow, id=f"{role}-every-step")
            for role, names in STEPS.items()
        ),
    ],
)
def test_a_worker_stops_there_and_comes_back(
    served: Served, role: str, names: tuple[str, ...]
) -> None:
    fleet = served.fleet
    victim = served.start_victim(role, names, "stop")
    process = psutil.Process(fleet.pid(victim))
    for name in names:
        print(f"stopped at {name}")
        served.strike(victim, lambda: process.status() == psutil.STATUS_STOPPED)
        fleet.assert_no_leak(LEASE_S)  # on the others
        fleet.cont(victim)
        fleet.wait_workers(victim, "prefill-1", "decode-1")
        fleet.assert_no_leak(LEASE_S)
    fleet.kill(victim)
