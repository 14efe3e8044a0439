"""Every toxic does what it says, over plain TCP."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.fault_proxy import (
    DOWN,
    UP,
    Bandwidth,
    BitFlip,
    Cut,
    Drop,
    FaultProxy,
    Latency,
    Reset,
    Slicer,
    Toxic,
)

DATA = bytes(range(256)) * 400


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    """In front of a server that sends everything back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with FaultProxy(server.sockets[0].getsockname()[:2]) as made:
        yield made
    server.close()


async def exchange(proxy: FaultProxy, data: bytes = DATA, timeout_s: float = 5.0) -> bytes:
    """What comes back of `data`, until everything has or the connection ends.

    Raises:
        OSError: it was reset.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    got = bytearray()

    async def read() -> None:
        while len(got) < len(data) and (part := await reader.read(1 << 16)):
            got.extend(part)

    try:
        writer.write(data)
        try:
            async with asyncio.timeout(timeout_s):
                await read()
        except TimeoutError:
            pass
    finally:
        writer.transport.abort()
    return bytes(got)


async def test_nothing_is_changed_without_toxics(proxy: FaultProxy) -> None:
    assert await exchange(proxy) == DATA
    assert proxy.num_bytes == {UP: len(DATA), DOWN: len(DATA)}


async def test_latency_delays_and_does_not_slow_down(proxy: FaultProxy) -> None:
    toxic = proxy.add(Latency(DOWN, latency_s=0.3))
    began_s = time.monotonic()
    assert await exchange(proxy, DATA * 10) == DATA * 10
    assert 0.3 <= time.monotonic() - began_s < 3
    assert toxic.hits > 1


async def test_bandwidth(proxy: FaultProxy) -> None:
    toxic = proxy.add(Bandwidth(UP, bytes_per_s=len(DATA) * 4))
    began_s = time.monotonic()
    assert await exchange(proxy) == DATA
    assert time.monotonic() - began_s >= 0.25
    assert toxic.hits


async def test_slices(proxy: FaultProxy) -> None:
    toxic = proxy.add(Slicer(size=20))
    assert await exchange(proxy) == DATA
    assert toxic.hits


async def test_reset(proxy: FaultProxy) -> None:
    toxic = proxy.add(Reset(DOWN, after_bytes=50_000, times=1))
    with pytest.raises(ConnectionResetError):
        await exchange(proxy)
    assert toxic.hits == 1
    assert await exchange(proxy) == DATA


async def test_cut_after_so_many_bytes(proxy: FaultProxy) -> None:
    toxic = proxy.add(Cut(DOWN, after_bytes=50_000))
    assert await exchange(proxy) == DATA[:50_000]
    assert toxic.hits == 1


async def test_a_drop_goes_one_way_and_is_for_good(proxy: FaultProxy) -> None:
    toxic = proxy.add(Drop(DOWN, after_bytes=1))
    assert len(await exchange(proxy, timeout_s=0.3)) < len(DATA)
    assert toxic.hits
    assert proxy.num_bytes[UP] == len(DATA)
    proxy.heal()
    assert await exchange(proxy) == DATA


async def test_bits_flip(proxy: FaultProxy) -> None:
    toxic = proxy.add(BitFlip(UP, every_bytes=10_000, after_bytes=1000))
    got = await exchange(proxy)
    num_flipped = sum((a ^ b).bit_count() for a, b in zip(got, DATA, strict=True))
    assert num_flipped == toxic.hits > 2
    assert got[:1000] == DATA[:1000]


async def test_toxics_spare_whom_only_spares(proxy: FaultProxy) -> None:
    proxy._only = lambda connection: False
    toxic: Toxic = proxy.add(Reset(after_bytes=0))
    assert await exchange(proxy) == DATA
    assert toxic.hits == 0
