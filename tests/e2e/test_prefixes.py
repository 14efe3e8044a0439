"""Over real processes: a prefill worker takes a prefix that another worker holds, by hash."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from harness import bearable_silence_s, free_port

from baton import SamplingParams

# Whatever carries the frames, it is the same fetch: tests/kvtransfer has them all.
FLEETS = ("shm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpc", "ucx")))
SEEDED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 7, "ignore_eos": True}
FIRST = {**SEEDED, "max_tokens": 96}
SECOND = {**SEEDED, "max_tokens": 16}
LOCALITY_S = 1.0  # for what a worker publishes to reach the gateway through Redis

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", params=FLEETS)
def fleet(request: pytest.FixtureRequest, make_fleet) -> Iterator[Any]:
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    env = {"BATON_TRANSPORTS": request.param, "BATON_PREFIX_FETCH": "always"}
    with make_fleet("prefill-0", **env) as running:
        # Not the prefill worker's block size: both ends convert.
        running.start_worker("decode-0", BATON_BLOCK_SIZE="32")
        running.wait_workers("prefill-0", "decode-0")
        running.transport = request.param
        yield running
        running.assert_no_leak()


def tokens(num_tokens: int, seed: int) -> list[int]:
    return [(seed * 31 + i * 7 + i * i * (seed + 1)) % 1900 + 20 for i in range(num_tokens)]


def computed_by(port: int) -> float:
    """Tokens that the worker whose metrics are there has prefilled."""
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
        if line.startswith("baton_prefill_tokens_total "):
            return float(line.rpartition(" ")[2])
    raise AssertionError("no such metric")


def test_the_next_turn_of_a_chat_is_fetched_from_the_decode_worker(fleet, oracle) -> None:
    """By a prefill worker that has never seen the chat: the one that had is gone."""
    prompt = tokens(200, seed=1)
    first = fleet.complete({"prompt": prompt, **FIRST})
    assert first.token_ids == oracle(prompt, SamplingParams(**FIRST))
    port = free_port()
    fleet.start_worker("prefill-1", BATON_METRICS_PORT=str(port))
    fleet.wait_workers("prefill-1", "decode-0")
    assert fleet.terminate("prefill-0") == 0
    fleet.wait_ready()
    time.sleep(LOCALITY_S)

    chat = [*prompt, *first.token_ids[0], *tokens(30, seed=2)]
    held = (len(prompt) + len(first.token_ids[0]) - 1) // 32 * 32  # the last token was never run
    moved = fleet.metric("baton_kv_transfer_bytes_total", transport=fleet.transport)
    computed = computed_by(port)
    second = fleet.complete({"prompt": chat, **SECOND})
    assert second.token_ids == oracle(chat, SamplingParams(**SECOND))
    assert fleet.metric("baton_prefix_fetches_total", outcome="ok") == 1
    assert fleet.metric("baton_fetched_prefix_tokens_total") == held
    assert fleet.metric("baton_kv_transfer_bytes_total", transport=fleet.transport) > moved
    assert computed_by(port) - computed == len(chat) - held
    assert second.usage["prompt_tokens_details"]["cached_tokens"] == held


def test_a_source_that_is_killed_costs_no_answer(fleet, oracle) -> None:
    """The gateway's picture of it is stale for a moment; the prompt is computed."""
    prompt = tokens(200, seed=3)
    first = fleet.complete({"prompt": prompt, **FIRST})
    time.sleep(LOCALITY_S)
    fleet.start_worker("decode-1", BATON_BLOCK_SIZE="32")
    fleet.wait_workers("decode-1")
    fleet.kill("decode-0")
    chat = [*prompt, *first.token_ids[0], *tokens(30, seed=4)]
    second = fleet.complete({"prompt": chat, **SECOND})
    assert second.error is None
    assert second.token_ids == oracle(chat, SamplingParams(**SECOND))


@pytest.mark.slow
def test_a_source_that_stops_midway_costs_a_moment(fleet, oracle) -> None:
    """No deadline (`always`), and yet nobody waits for it longer than for any silent worker."""
    hooks = {"BATON_TEST_HOOKS": "true", "BATON_FAILPOINT": "attach:+1=stop"}
    fleet.start_worker("decode-2", BATON_BLOCK_SIZE="32", **hooks)
    fleet.wait_workers("decode-2")
    for name in [*fleet.processes]:
        if name.startswith("decode") and name != "decode-2":
            assert fleet.terminate(name) == 0
    prompt = tokens(200, seed=5)
    first = fleet.complete({"prompt": prompt, **FIRST})
    fleet.start_worker("decode-3", BATON_BLOCK_SIZE="32")
    fleet.wait_workers("decode-3")
    time.sleep(LOCALITY_S)
    fetched = fleet.metric("baton_prefix_fetches_total")
    whole = fleet.metric("baton_prefix_fetches_total", outcome="ok")
    os.kill(fleet.pid("decode-2"), signal.SIGUSR1)
    chat = [*prompt, *first.token_ids[0], *tokens(30, seed=6)]
    second = fleet.complete({"prompt": chat, **SECOND})
    assert psutil.Process(fleet.pid("decode-2")).status() == psutil.STATUS_STOPPED
    assert second.error is None
    assert second.token_ids == oracle(chat, SamplingParams(**SECOND))
    assert second.longest_silence_s < bearable_silence_s()
    assert fleet.metric("baton_prefix_fetches_total") == fetched + 1
    assert fleet.metric("baton_prefix_fetches_total", outcome="ok") == whole
    fleet.cont("decode-2")
    fleet.wait_workers("decode-2")
