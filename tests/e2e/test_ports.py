"""Every port of a real fleet: what strangers send there, and what the metrics ports say."""

import random
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from baton import SamplingParams

WORKERS = ("prefill-0", "decode-0")
BODY = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 3, "max_tokens": 8}
RNG = random.Random(1)
NOISE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + RNG.randbytes(9),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + RNG.randbytes(500),  # a TLS hello
    b"*1\r\n$4\r\nPING\r\n",
    bytes(64),
    b"\xff" * 64,
    *(RNG.randbytes(size) for size in (1, 8, 64, 4096, 1 << 16)),
]


@pytest.fixture(scope="module")
def fleet(plain_fleet) -> Any:
    return plain_fleet


def listening(pid: int) -> set[tuple[str, int]]:
    connections = psutil.Process(pid).net_connections("tcp")
    return {
        (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
        for c in connections
        if c.status == psutil.CONN_LISTEN
    }


def send(address: tuple[str, int], noise: bytes, waits: bool) -> None:
    with suppress(OSError), socket.create_connection(address, 5) as connection:
        connection.settimeout(0.05)
        connection.sendall(noise)
        if waits:
            connection.recv(100)


def prompt(number: int) -> list[int]:
    return [(number * 31 + i * 29 + i * i * 3) % 1900 + 20 for i in range(200)]


def test_noise_at_every_port_of_every_process(fleet, oracle) -> None:
    """Nothing dies of it, requests are served meanwhile and after, and nothing stays behind."""
    names = ("gateway", *WORKERS)
    ports = {name: listening(fleet.pid(name)) for name in names}
    assert all(len(ports[name]) >= 2 for name in WORKERS), "gRPC and metrics at least"
    assert all(host.startswith("127.") for of in ports.values() for host, _ in of)
    num_threads = {name: psutil.Process(fleet.pid(name)).num_threads() for name in names}
    params = SamplingParams(**BODY)
    remote = fleet.metric("baton_remote_prefills_total")
    with ThreadPoolExecutor(4) as pool:
        sent = [
            pool.submit(send, port, noise, waits)
            for name in names
            for port in sorted(ports[name])
            for noise in NOISE
            for waits in (False, True)
        ]
        for number in range(3):
            result = fleet.complete({"prompt": prompt(number), **BODY})
            assert result.error is None
            assert result.token_ids == oracle(prompt(number), params)
        for one in sent:
            one.result()
    result = fleet.complete({"prompt": prompt(9), **BODY})
    assert result.token_ids == oracle(prompt(9), params)
    assert fleet.metric("baton_remote_prefills_total") > remote
    for name in names:
        assert fleet.processes[name].poll() is None, fleet.log_tail(name)
        assert listening(fleet.pid(name)) == ports[name]
        wait_for_threads(fleet.pid(name), num_threads[name] + 2)
    fleet.assert_no_leak()


def wait_for_threads(pid: int, num_threads: int) -> None:
    """Pools may have grown by a thread or two; connections must not have left theirs."""
    deadline = time.monotonic() + 20
    while psutil.Process(pid).num_threads() > num_threads and time.monotonic() < deadline:
        time.sleep(0.1)
    assert psutil.Process(pid).num_threads() <= num_threads


def test_every_series_is_documented_and_there(fleet) -> None:
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    _, gateway, vllm, worker, _ = re.split(r"^## .*$", text, flags=re.MULTILINE)
    assert exposed(fleet.client.get("/metrics").text) == names_in(gateway) | names_in(vllm)
    for name in WORKERS:
        log = fleet.logs[name].read_text(errors="replace")
        (port,) = set(re.findall(r"metrics on port (\d+)", log))
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10)
        assert exposed(answer.text) == names_in(worker)
        assert 'baton_kv_blocks{state="total"}' in answer.text


def exposed(text: str) -> set[str]:
    names = re.findall(r"^# TYPE ((?:baton_|vllm:)\w+) ", text, re.MULTILINE)
    return {name for name in names if not name.endswith("_created")}


def names_in(section: str) -> set[str]:
    return set(re.findall(r"^\| `((?:baton_|vllm:)\w+)`", section, re.MULTILINE))
