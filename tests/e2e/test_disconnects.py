"""A client that goes away is noticed in every phase: nothing of its request runs on any worker a
moment later."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

SOON_S = 1.0 + 0.5  # and a heartbeat, until the gateway's view of an idle worker is new
PROMPT_LEN = 900  # eight steps of prefill
BODY = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def fleet(make_fleet) -> Iterator[Any]:
    with make_fleet("prefill-0", "decode-0", BATON_MAX_NUM_SEQS="2") as running:
        running.wait_workers("prefill-0", "decode-0")
        yield running


class Client:
    """One request in a thread of its own, until told to leave."""

    def __init__(self, fleet: Any, *, stream: bool, **fields: Any) -> None:
        self._leave = threading.Event()
        self.has_token = threading.Event()
        self._body = {**BODY, "stream": stream, **fields}
        self._client = httpx.Client(base_url=fleet.client.base_url, timeout=60.0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with (
            suppress(httpx.TransportError, httpx.StreamError, ValueError, OSError),
            self._client.stream("POST", "/v1/completions", json=self._body) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.has_token.set()

    def leave(self) -> None:
        """Close the connection, whatever it waits for."""
        for connection in self._client._transport._pool.connections:  # type: ignore[attr-defined]
            stream = connection._connection._network_stream
            with suppress(OSError):
                stream.get_extra_info("socket").shutdown(2)
        self._thread.join(10)
        self._client.close()


def load(fleet: Any, name: str) -> int:
    return sum(int(worker["load"][name]) for worker in fleet.cluster()["workers"])


def prompt(case: str) -> list[int]:
    seed = sum(map(ord, case))
    return [(seed * 131 + i * 17 + i * i) % 1900 + 20 for i in range(PROMPT_LEN)]


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
def test_a_client_leaves(fleet, phase: str, stream: bool) -> None:
    tokens = fleet.metric("baton_generation_tokens_total")
    client = Client(fleet, stream=stream, prompt=prompt(f"{phase}{stream}"))
    if phase == "prefilling":
        wait_for(lambda: load(fleet, "queued_prefill_tokens"), "it prefills")
    else:
        wait_for(lambda: load(fleet, "context_tokens"), "it decodes")
    client.leave()
    fleet.assert_no_leak(timeout_s=SOON_S)
    assert fleet.client.get("/load").json() == {"server_load": 0}
    assert fleet.metric("baton_generation_tokens_total") - tokens < 100, "it did not run to its end"


@pytest.mark.parametrize("stream", [False, True])
def test_clients_leave_while_they_wait(fleet, stream: bool) -> None:
    """More than the fleet takes at once: some are queued, some prefill, some decode."""
    clients = [Client(fleet, stream=stream, prompt=prompt(f"queue{stream}{i}")) for i in range(8)]
    wait_for(lambda: fleet.client.get("/load").json()["server_load"] == 8, "all have arrived")
    wait_for(lambda: load(fleet, "running"), "some run")
    started = time.monotonic()
    for client in clients:
        client.leave()
    wait_for(lambda: fleet.client.get("/load").json()["server_load"] == 0, "none is left")
    assert time.monotonic() - started < SOON_S
    fleet.assert_no_leak(timeout_s=SOON_S)
