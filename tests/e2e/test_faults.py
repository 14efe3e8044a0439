"""Workers, gateways and Redis are killed, stopped and restarted under a stream: no wrong token, no
error that a client could have been spared, no leak, no hang.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from harness import bearable_silence_s, free_port

from baton import SamplingParams

BODY = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 11,
    "max_tokens": 96,
    "ignore_eos": True,
}


def prompt(seed: int, length: int = 120) -> list[int]:
    return [(seed * 131 + i * 17 + i * i) % 1900 + 20 for i in range(length)]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{**BODY, **changes})


pytestmark = pytest.mark.timeout(400)

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture(scope="module")
def base(make_fleet) -> Iterator[Any]:
    with make_fleet(*WORKERS) as running:
        yield running


@pytest.fixture
def fleet(base) -> Any:
    return with_workers(base, *WORKERS)


def with_workers(base, *names: str) -> Any:
    """The fleet with these at least, after whatever the last test has done to it."""
    for name in names:
        if name not in base.processes:
            base.start_worker(name)
        base.cont(name)
    base.wait_ready()
    base.wait_workers(*names)
    return base


def without(fleet, *names: str) -> None:
    for name in names:
        if name in fleet.processes:
            fleet.kill(name)


def busy_worker(fleet, role: str) -> str:
    """The worker of this role that runs the only request."""
    workers = [worker for worker in fleet.cluster()["workers"] if worker["role"] == role]
    # A gateway's probe of a new route, which is short, may run as well.
    busiest = max(workers, key=lambda w: (w["load"]["context_tokens"], w["load"]["leases"]))
    assert busiest["load"]["running"] or busiest["load"]["leases"], fleet.cluster()
    return str(busiest["worker_id"])


# A worker's start takes longer than most tests: what one has killed, the next can do without.


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_decode_worker_is_lost_midway(fleet, oracle, how: str) -> None:
    victims: list[str] = []

    def strike(count: int) -> None:
        if count >= 12 and not victims:
            victims.append(busy_worker(fleet, "decode"))
            getattr(fleet, how)(victims[0])

    ids = prompt(1 if how == "kill" else 51)
    before = fleet.metric("baton_migrations_total", cause="failure", result="attached")
    result = fleet.complete({"prompt": ids, **BODY}, strike)
    assert victims
    assert result.error is None
    assert result.token_ids == oracle(ids, params())
    attached = fleet.metric("baton_migrations_total", cause="failure", result="attached")
    assert attached == before + 1, "it went on with the KV of the lease"
    assert result.longest_silence_s < bearable_silence_s()
    if how == "stop":
        fleet.cont(victims[0])
    else:
        fleet.start_worker(victims[0])
    fleet.wait_workers("decode-0", "decode-1")
    fleet.assert_no_leak()


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_prefill_worker_is_lost_after_the_hand_over(fleet, oracle, how: str) -> None:
    victims: list[str] = []

    def strike(count: int) -> None:
        if count >= 12 and not victims:
            victims.append(busy_worker(fleet, "prefill"))
            getattr(fleet, how)(victims[0])

    ids = prompt(2 if how == "kill" else 52)
    result = fleet.complete({"prompt": ids, **BODY, "n": 2}, strike)
    assert victims
    assert result.error is None
    assert result.token_ids == oracle(ids, params(n=2))
    assert result.longest_silence_s < bearable_silence_s()
    if how == "stop":
        fleet.cont(victims[0])
    fleet.assert_no_leak()


def test_a_client_that_leaves_frees_everything(fleet) -> None:
    for num_lines in (0, 1, 10):
        body = {"prompt": prompt(8 + num_lines, 400), **BODY, "max_tokens": 500, "stream": True}
        with fleet.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            for _ in range(num_lines):
                next(lines)
    fleet.assert_no_leak(timeout_s=10)


def test_the_gateway_is_killed_under_streams_and_workers_clean_up(fleet) -> None:
    started = threading.Barrier(5)

    def stream(i: int) -> None:
        body = {"prompt": prompt(20 + i), **BODY, "max_tokens": 800, "stream": True}
        try:
            with fleet.client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                started.wait(30)
                for _ in lines:
                    pass
        except httpx.TransportError:
            pass

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    started.wait(30)
    fleet.kill("gateway")
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    fleet.start_gateway()
    fleet.wait_ready()
    fleet.wait_workers("prefill-0", "prefill-1", "decode-0", "decode-1")
    fleet.assert_no_leak()


def test_a_worker_told_to_end_drains(fleet, oracle) -> None:
    codes: list[int] = []
    thread: list[threading.Thread] = []

    def drain(count: int) -> None:
        if count >= 8 and not thread:
            name = busy_worker(fleet, "decode")
            thread.append(threading.Thread(target=lambda: codes.append(fleet.terminate(name))))
            thread[0].start()

    result = fleet.complete({"prompt": prompt(40), **BODY, "max_tokens": 200}, drain)
    thread[0].join(60)
    assert codes == [0]
    assert result.error is None
    assert result.token_ids == oracle(prompt(40), params(max_tokens=200))
    fleet.assert_no_leak()


def test_all_prefill_workers_gone_decode_workers_prefill(fleet, oracle) -> None:
    fleet.kill("prefill-0")
    fleet.kill("prefill-1")
    before = fleet.metric("baton_local_prefills_total")
    result = fleet.complete({"prompt": prompt(3), **BODY})
    assert result.token_ids == oracle(prompt(3), params())
    assert fleet.metric("baton_local_prefills_total") == before + 1
    fleet.assert_no_leak()


def test_a_worker_restarts_on_the_same_port(base, oracle) -> None:
    port = str(free_port())
    fleet = with_workers(base, "decode-0")
    without(fleet, "prefill-0", "prefill-1")
    fleet.start_worker("prefill-0", BATON_WORKER_PORT=port)
    fleet.wait_workers("prefill-0")
    first = fleet.complete({"prompt": prompt(30), **BODY})
    fleet.kill("prefill-0")
    fleet.start_worker("prefill-0", BATON_WORKER_PORT=port)
    fleet.wait_workers("prefill-0")
    before = fleet.metric("baton_remote_prefills_total")
    second = fleet.complete({"prompt": prompt(31), **BODY})
    assert first.token_ids == oracle(prompt(30), params())
    assert second.token_ids == oracle(prompt(31), params())
    assert fleet.metric("baton_remote_prefills_total") == before + 1
    fleet.assert_no_leak()


def test_all_decode_workers_gone_prefill_workers_decode(base, oracle) -> None:
    fleet = with_workers(base, "prefill-0", "decode-0", "decode-1")
    fleet.kill("decode-0")
    fleet.kill("decode-1")
    result = fleet.complete({"prompt": prompt(4), **BODY})
    assert result.token_ids == oracle(prompt(4), params())
    fleet.assert_no_leak()


def test_redis_stands_still_dies_and_comes_back_empty(base, oracle) -> None:
    fleet = with_workers(base, "prefill-0", "decode-0")
    without(fleet, "decode-1")
    fleet.stop("redis")
    result = fleet.complete({"prompt": prompt(9), **BODY})
    assert result.token_ids == oracle(prompt(9), params())
    assert result.longest_silence_s < bearable_silence_s(), "nobody waits for one that is slow"
    fleet.kill("redis")
    result = fleet.complete({"prompt": prompt(6), **BODY})
    assert result.token_ids == oracle(prompt(6), params())
    fleet.start_redis()
    result = fleet.complete({"prompt": prompt(7), **BODY})
    assert result.token_ids == oracle(prompt(7), params())
    fleet.start_worker("decode-1")  # a newcomer is found: membership works again
    fleet.wait_workers("decode-1", "prefill-0", "decode-0")
    fleet.assert_no_leak()


def test_everything_gone_is_503_with_retry_after_at_once(base) -> None:
    fleet = with_workers(base, "prefill-0", "decode-0")
    without(fleet, *WORKERS)
    deadline = time.monotonic() + 10
    status = 200
    while status == 200 and time.monotonic() < deadline:
        answer = fleet.client.post("/v1/completions", json={"prompt": prompt(5), **BODY})
        status = answer.status_code
    assert status == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"]
