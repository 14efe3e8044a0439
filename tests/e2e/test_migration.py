"""A decode worker is told to end under streams: they move to another one, and no client notices."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from baton import SamplingParams

NUM_TOKENS = 100
COMMON = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "top_p": 1.0, "top_k": 0}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "seed": 1},
    {"temperature": 0.8, "seed": 2, "frequency_penalty": 0.5, "top_p": 0.9},
    {"temperature": 1.0, "seed": 3, "n": 2},
]
MAX_SILENCE_S = 3.0


pytestmark = pytest.mark.timeout(400)


def prompt(seed: int, length: int = 120) -> list[int]:
    return [(seed * 131 + i * 17 + i * i) % 1900 + 20 for i in range(length)]


@pytest.fixture
def fleet(make_fleet) -> Iterator[Any]:
    with make_fleet("prefill-0", "decode-0", BATON_REBALANCE="false") as running:
        running.wait_workers("prefill-0", "decode-0")
        yield running


def stream_all(fleet, when_all_run: Callable[[], None]) -> list[Any]:
    """One stream of each kind; then, with all of them well on their way, `when_all_run`."""
    on_their_way = threading.Barrier(len(KINDS) + 1)

    def stream(index: int) -> Any:
        waited: list[bool] = []

        def on_token(count: int) -> None:
            if count >= 24 and not waited:
                waited.append(True)
                on_their_way.wait(60)

        return fleet.complete({"prompt": prompt(index), **COMMON, **KINDS[index]}, on_token)

    with ThreadPoolExecutor(len(KINDS)) as pool:
        streams = [pool.submit(stream, index) for index in range(len(KINDS))]
        on_their_way.wait(60)
        when_all_run()
        return [one.result(120) for one in streams]


def test_streams_move_away_from_a_decode_worker_that_ends(fleet, oracle) -> None:
    codes: list[int] = []
    took_s: list[float] = []
    states: set[str] = set()

    def end() -> None:
        fleet.start_worker("decode-1")
        fleet.wait_workers("decode-1")
        before = time.monotonic()
        process = fleet.processes.pop("decode-0")
        process.terminate()
        while process.poll() is None:
            states.update(
                w["state"] for w in fleet.cluster()["workers"] if w["worker_id"] == "decode-0"
            )
            time.sleep(0.01)
        codes.append(process.returncode)
        took_s.append(time.monotonic() - before)

    results = stream_all(fleet, end)
    for index, result in enumerate(results):
        assert result.error is None
        sampling = SamplingParams(**{**COMMON, **KINDS[index]})
        assert result.token_ids == oracle(prompt(index), sampling), KINDS[index]
        assert result.longest_silence_s < MAX_SILENCE_S
    assert codes == [0]
    assert "draining" in states
    moved = fleet.metric("baton_migrations_total", cause="drain", result="moved")
    assert moved == len(KINDS), fleet.log_tail("gateway")
    assert fleet.metric("baton_migration_bytes_total", cause="drain") > 0
    fleet.assert_no_leak()


def test_a_second_signal_ends_at_once(fleet) -> None:
    def end() -> None:
        process = fleet.processes.pop("decode-0")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None, "streams are on it, and there is nowhere to go"
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 1

    results = stream_all(fleet, end)  # the prefill worker goes on alone
    assert all(result.error is None for result in results)
    fleet.assert_no_leak()


def test_a_prefill_worker_ends_while_its_requests_decode(fleet, oracle) -> None:
    """Its KV was read: nobody waits for streams that do not need it any more."""
    codes: list[int] = []

    def end() -> None:
        codes.append(fleet.terminate("prefill-0", timeout_s=8.0))

    for index, result in enumerate(stream_all(fleet, end)):
        assert result.error is None
        sampling = SamplingParams(**{**COMMON, **KINDS[index]})
        assert result.token_ids == oracle(prompt(index), sampling)
    assert codes == [0]
    fleet.assert_no_leak()
