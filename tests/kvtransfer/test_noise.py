"""What strangers send to the ports of the exchange: nothing dies of it."""

import asyncio
import importlib.util
import random
import socket
from contextlib import suppress

import psutil
import pytest

from tests.kvtransfer.support import (
    RecordingSink,
    ScriptedSource,
    frames_script,
    grpc_end,
    make_fetch,
)

RNG = random.Random(1)
NOISE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + RNG.randbytes(9),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + RNG.randbytes(500),  # a TLS hello
    b"*1\r\n$4\r\nPING\r\n",
    bytes(64),
    b"\xff" * 64,
    *(RNG.randbytes(size) for size in (1, 3, 8, 16, 64, 4096, 1 << 16)),
]


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("tcp")
    return {
        (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
        for c in connections
        if c.status == psutil.CONN_LISTEN
    }


def send_noise(address: tuple[str, int], noise: bytes, waits: bool) -> None:
    with suppress(OSError), socket.create_connection(address, 5) as connection:
        connection.settimeout(0.05)
        connection.sendall(noise)
        if waits:
            connection.recv(100)


@pytest.mark.parametrize(
    "transport",
    [
        "grpc",
        pytest.param(
            "ucx",
            marks=[
                pytest.mark.ucx,
                pytest.mark.skipif(
                    importlib.util.find_spec("ucxx") is None,
                    reason="the ucx extra is not installed",
                ),
            ],
        ),
    ],
)
async def test_noise_at_every_port(transport: str) -> None:
    before = listening()
    frames = [RNG.randbytes(100_000)] * 3
    async with grpc_end(transport) as producer, grpc_end(transport) as consumer:
        address = await producer.start(ScriptedSource(frames_script(frames)))
        ports = listening() - before
        assert len(ports) >= 2
        assert all(host.startswith("127.") for host, _ in ports), "others could reach it"
        for port in ports:
            for noise in NOISE:
                await asyncio.to_thread(send_noise, port, noise, waits=False)
                await asyncio.to_thread(send_noise, port, noise, waits=True)
            sink = RecordingSink(len(frames))
            await consumer.fetch(address, make_fetch(1), sink)
            assert sink.frames == frames
