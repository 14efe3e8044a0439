"""`kill -9` and SIGSTOP of a worker at every numbered step of a request, by named failpoints: no
wrong token, no error that another worker could have spared, no leak, no hang."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from baton import SamplingParams

BODY = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 3, "max_tokens": 24}
BODY |= {"ignore_eos": True, "n": 2}
PROMPT_LEN = 300  # three chunks of prefill
MAX_ROUNDS = 6  # until the armed worker has been chosen and has died

STEPS = {
    "prefill": ["submit", "admitted", "progress", "attach", "frame-sent", "sampled", "release"],
    "decode": ["bind", "bound", "frame", "fetched", "imported", "token"],
}
QUICK = {("prefill", "frame-sent", "kill"), ("decode", "imported", "stop")}


def cases() -> Iterator[Any]:
    for role, names in STEPS.items():
        for name in names:
            for how in ("kill", "stop"):
                marks = () if (role, name, how) in QUICK else (pytest.mark.slow,)
                yield pytest.param(role, name, how, marks=marks, id=f"{name}-{how}")


@pytest.fixture(scope="module")
def fleet(make_fleet) -> Iterator[Any]:
    with make_fleet("prefill-1", "decode-1") as running:
        running.wait_workers("prefill-1", "decode-1")
        yield running


def prompt(case: str, number: int) -> list[int]:
    seed = sum(map(ord, case)) * 101 + number * 13
    return [(seed + i * 29 + i * i * 3) % 1900 + 20 for i in range(PROMPT_LEN)]


def is_struck(fleet, victim: str, how: str) -> bool:
    """Has the failpoint fired? The last of them fires just after the client has its answer."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if how == "kill" and fleet.processes[victim].poll() is not None:
            return True
        process = psutil.Process(fleet.pid(victim))
        if how == "stop" and process.status() == psutil.STATUS_STOPPED:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("role", "name", "how"), list(cases()))
def test_a_worker_dies_there(fleet, oracle, role: str, name: str, how: str) -> None:
    victim = f"{role}-0"  # the first of its role in every tie
    route = f"{victim} → decode-1" if role == "prefill" else f"prefill-1 → {victim}"
    with fleet.expect_log("gateway", f"route {route} is proven"):
        fleet.start_worker(victim, BATON_FAILPOINT=f"{name}:+1={how}", BATON_TEST_HOOKS="true")
        fleet.wait_workers(victim, "prefill-1", "decode-1")
    os.kill(fleet.pid(victim), signal.SIGUSR1)  # from here on it is a client's request that counts
    params = SamplingParams(**BODY)
    for number in range(MAX_ROUNDS):
        # Two at once: whichever worker is predicted to be faster, the other one gets work as well.
        prompts = [prompt(f"{name}-{how}", 2 * number + i) for i in range(2)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            results = list(pool.map(lambda ids: fleet.complete({"prompt": ids, **BODY}), prompts))
        for tokens, result in zip(prompts, results, strict=True):
            assert result.error is None
            assert result.token_ids == oracle(tokens, params)
        if is_struck(fleet, victim, how):
            break
    assert is_struck(fleet, victim, how), "the failpoint was never passed"
    fleet.kill(victim)
    fleet.assert_no_leak()
