"""What strangers send to the ports of the exchange: nothing dies of it."""

import asyncio
import importlib.util
import random
import socket
from contextlib import ExitStack, suppress

import psutil
import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer import shm_outlet
from baton.kvtransfer.shm import ShmTransport
from tests.kvtransfer.support import (
    RecordingSink,
    ScriptedSource,
    connected,
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


def send_locally(path: str, noise: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(5)
    connection.connect(path)
    with suppress(OSError):  # hung up on already
        connection.send(noise)
    return connection


async def test_noise_at_the_socket_of_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the worker's own user, the only one who can get there; and not too much of it stays."""
    monkeypatch.setattr(shm_outlet, "_STRANGER_S", 0.2)
    frames = [RNG.randbytes(100_000)] * 3
    num_files = psutil.Process().num_fds()
    async with connected("shm") as pair:
        assert isinstance(pair.producer, ShmTransport)
        address = await pair.producer.start(ScriptedSource(frames_script(frames)))
        path = "/" + address.address.split("/", 3)[3]
        listener = pair.producer._listener
        with ExitStack() as stack:
            for noise in [*NOISE, b"", RNG.randbytes(32), RNG.randbytes(33)]:
                stack.enter_context(await asyncio.to_thread(send_locally, path, noise))
            for _ in range(2 * shm_outlet._MAX_STRANGERS):  # and of those who say nothing
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                stack.enter_context(connection)
                await asyncio.to_thread(connection.connect, path)
                await asyncio.sleep(0)
            assert len(listener._outlets) <= shm_outlet._MAX_STRANGERS
            async with asyncio.timeout(10):
                while listener._outlets:
                    await asyncio.sleep(0.05)
            sink = RecordingSink(len(frames))
            await pair.consumer.fetch(address, make_fetch(1), sink)
            assert sink.frames == frames
            assert len(listener._outlets) == 1
            await asyncio.sleep(0.3)
            assert len(listener._outlets) == 1, "a connection that has served a fetch stays"
    assert psutil.Process().num_fds() <= num_files


async def test_another_user_gets_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder keeps others out; should it not, the kernel says who they are."""
    async with connected("shm") as pair:
        address = await pair.producer.start(ScriptedSource(frames_script([b"frame"])))
        monkeypatch.setattr(shm_outlet, "is_same_user", lambda _: False)
        with pytest.raises(BatonError) as caught:
            await pair.consumer.fetch(address, make_fetch(1), RecordingSink(1))
        assert caught.value.cause is Cause.TRANSPORT_FAILED
