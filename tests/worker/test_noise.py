"""What strangers send to a worker's metrics port: nothing dies of it, and nothing stays behind."""

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from baton.worker.metrics import MetricsServer
from tests.kvtransfer.test_noise import NOISE, send_noise

NUM_SILENT = 20


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    made = MetricsServer("127.0.0.1", 0)
    yield made
    made.close()


def scrape(server: MetricsServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_noise_at_the_metrics_port(server: MetricsServer) -> None:
    num_threads = threading.active_count()
    for noise in NOISE:
        for waits in (False, True):
            send_noise(("127.0.0.1", server.port), noise, waits)
    assert "baton_kv_blocks" in scrape(server)
    wait_for_threads(num_threads)


def test_silent_connections_hold_up_nobody(server: MetricsServer) -> None:
    num_threads = threading.active_count()
    with ExitStack() as stack:
        for _ in range(NUM_SILENT):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 5))
        assert "baton_kv_blocks" in scrape(server)
    wait_for_threads(num_threads)


def wait_for_threads(num_threads: int) -> None:
    deadline = time.monotonic() + 20
    while threading.active_count() > num_threads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= num_threads, "a connection's thread lives on"
