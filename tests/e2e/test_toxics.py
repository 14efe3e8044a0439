"""A network that misbehaves between real processes: between D and P, where KV flows, and between
the gateway and a worker. No wrong token, no client error, no long silence, no leak.

A worker listens on one loopback address and advertises another, where a proxy listens. KV goes over
gRPC here; tests/kvtransfer/test_toxics.py has UCX.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import psutil
import pytest
from harness import MAX_SILENCE_S, SLACK_S

from baton import SamplingParams
from tests.fault_proxy import (
    DOWN,
    UP,
    Bandwidth,
    BitFlip,
    Connection,
    Cut,
    Drop,
    FaultProxy,
    Latency,
    Reset,
    Slicer,
    Toxic,
)

T = TypeVar("T")

BODY = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5, "max_tokens": 32}
BODY |= {"ignore_eos": True, "n": 2}
PROMPT_LEN = 400
MAX_REQUESTS = 16  # until the toxic has fired


@dataclass
class Case:
    where: str  # "kv" (D's fetches from P), "prefill" or "decode" (the gateway's session with it)
    make: Callable[[], Toxic]
    imposed_s: float = 0.0  # silence that is the toxic's own doing


# What P sends to D for one prompt is about 400 KiB; a session's messages are some kilobytes.
CASES = {
    "kv-latency": Case("kv", lambda: Latency(latency_s=0.1), 1.0),
    "kv-bandwidth": Case("kv", lambda: Bandwidth(DOWN, bytes_per_s=400e3), 3.0),
    "kv-slicer": Case("kv", lambda: Slicer(size=300)),
    "kv-reset": Case("kv", lambda: Reset(DOWN, after_bytes=10_000)),
    "kv-cut": Case("kv", lambda: Cut(DOWN, after_bytes=10_000)),
    # Each of the two fetches stalls: a silent link is noticed in 2 or 3 s.
    "kv-drop": Case("kv", lambda: Drop(DOWN, after_bytes=10_000), 3.0),
    "kv-drop-up": Case("kv", lambda: Drop(UP, after_bytes=0), 3.0),
    "kv-flip": Case("kv", lambda: BitFlip(DOWN, every_bytes=10_000)),
    **{
        f"{role}-{name}": Case(role, make, imposed_s)
        for role in ("prefill", "decode")
        for name, make, imposed_s in (
            ("latency", lambda: Latency(latency_s=0.1), 0.5),
            ("slicer", lambda: Slicer(size=20), 0.0),
            ("reset", lambda: Reset(UP, after_bytes=500, times=1), 0.0),
            ("cut", lambda: Cut(DOWN, after_bytes=500, times=1), 0.0),
            ("drop", lambda: Drop(DOWN, after_bytes=500), 0.0),
            ("flip", lambda: BitFlip(every_bytes=700, times=3), 0.0),
        )
    },
}
QUICK = ("kv-flip", "kv-drop", "decode-flip")


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def call(self, function: Callable[[], T]) -> T:
        async def work() -> T:
            return function()

        return self.run(work())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@contextmanager
def behind(loop: Loop, inside: str, outside: str, port: int) -> Iterator[FaultProxy]:
    """A proxy at `outside` for what listens at `inside`."""
    proxy = FaultProxy((inside, port), outside, port)
    loop.run(proxy.__aenter__())
    try:
        yield proxy
    finally:
        loop.run(proxy.__aexit__())


def is_from(pid: int, connection: Connection) -> bool:
    """gRPC speaks IPv4 through IPv6 sockets, so addresses are written in two ways."""
    mine = psutil.Process(pid).net_connections("tcp")
    local = {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in mine if c.laddr}
    return connection.peer in local


def _add(proxy: FaultProxy, toxic: Toxic, gateway: int, is_kv: bool) -> None:
    """Poison either the gateway's connections (its sessions) or everybody else's."""
    proxy._only = lambda connection: is_from(gateway, connection) != is_kv
    for connection in proxy.connections:
        connection.is_poisoned = proxy._only(connection)
    proxy.add(toxic)


@pytest.fixture(scope="module")
def network(make_fleet) -> Iterator[Any]:
    import harness

    hosts = {
        "prefill-0": ("127.0.0.2", "127.0.0.3"),
        "prefill-1": ("127.0.0.4", "127.0.0.5"),
        "decode-0": ("127.0.0.6", "127.0.0.7"),
    }
    loop = Loop()
    with ExitStack() as stack:
        fleet = stack.enter_context(make_fleet("decode-1", BATON_TRANSPORTS="grpc"))
        proxies = {}
        for name, (inside, outside) in hosts.items():
            port = harness.free_port()
            proxies[name] = stack.enter_context(behind(loop, inside, outside, port))
            fleet.start_worker(
                name,
                BATON_WORKER_HOST=inside,
                BATON_ADVERTISE_HOST=outside,
                BATON_WORKER_PORT=str(port),
            )
        fleet.wait_workers("prefill-0", "prefill-1", "decode-0", "decode-1")
        yield fleet, loop, proxies
    loop.close()


def prompt(name: str, number: int) -> list[int]:
    seed = sum(map(ord, name)) * 7 + number * 31
    return [(seed + i * 23 + i * i * 5) % 1900 + 20 for i in range(PROMPT_LEN)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else (pytest.mark.slow,)) for n in CASES]
)
def test_nobody_notices(network, oracle, name: str) -> None:
    fleet, loop, proxies = network
    case = CASES[name]
    is_kv = case.where == "kv"
    # KV is disturbed from wherever it comes: the router keeps away from a link that has become
    # slow. A session is disturbed with one worker of two.
    names = ("prefill-0", "prefill-1") if is_kv else (f"{case.where}-0",)
    gateway, toxic = fleet.pid("gateway"), case.make()
    for one in names:
        loop.call(partial(_add, proxies[one], toxic, gateway, is_kv))
    params = SamplingParams(**BODY)
    remote = fleet.metric("baton_remote_prefills_total")
    try:
        for number in range(MAX_REQUESTS):
            tokens = prompt(name, number)
            result = fleet.complete({"prompt": tokens, **BODY})
            assert result.error is None, fleet.log_tail("gateway")
            assert result.token_ids == oracle(tokens, params)
            assert result.longest_silence_s < MAX_SILENCE_S + case.imposed_s + SLACK_S
            if toxic.hits:
                break
    finally:
        for one in names:
            loop.call(proxies[one].heal)
    print(f"{name}: {toxic.hits} hits, longest silence {result.longest_silence_s:.2f} s")
    assert toxic.hits, "the toxic never fired"
    fleet.wait_workers("prefill-0", "prefill-1", "decode-0", "decode-1")
    tokens = prompt(name, 99)
    assert fleet.complete({"prompt": tokens, **BODY}).token_ids == oracle(tokens, params)
    assert fleet.metric("baton_remote_prefills_total") > remote
    fleet.assert_no_leak()
