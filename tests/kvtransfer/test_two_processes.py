"""The transports between real processes, and what one side sees when the other is killed."""

import asyncio
import importlib.util
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Buffers, Outgoing
from baton.kvtransfer.frames import unsealed
from baton.kvtransfer.importer import Importer
from baton.types import KVRange, TransportAddress
from tests.kvtransfer.peer import NUM_TOKENS, known_pool
from tests.kvtransfer.support import (
    NUM_LAYERS,
    Pool,
    RecordingSink,
    ScriptedAttachment,
    ScriptedSource,
    grpc_end,
    make_fetch,
    make_pool,
    on_device,
)

ALL = KVRange(0, NUM_LAYERS, 0, NUM_TOKENS)
UCX = [
    pytest.mark.ucx,
    pytest.mark.skipif(
        importlib.util.find_spec("ucxx") is None, reason="the ucx extra is not installed"
    ),
]
TRANSPORTS = ["grpc", "shm", pytest.param("ucx", marks=UCX), pytest.param("cuda", marks=UCX)]


@asynccontextmanager
async def peer(
    role: str, transport: str, argument: str, **environ: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """(the process, the first line it prints)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.kvtransfer.peer", role, transport, argument),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        assert line, "the peer did not start"
        yield process, line.decode().strip()
    finally:
        process.stdin.close()
        if process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
                await process.wait()


def empty_pool(transport: str) -> Pool:
    pool = make_pool(32, [*range(NUM_TOKENS // 32 - 1, -1, -1)], seed=2)
    return on_device(pool) if transport == "cuda" else pool


async def fetch_all(transport: str, address: str) -> None:
    target = empty_pool(transport)
    importer = Importer(target.memory, target.block_ids, ALL)
    async with grpc_end(transport, target.memory.device) as consumer:
        stats = await consumer.fetch(
            TransportAddress(transport, address), make_fetch(NUM_TOKENS), importer
        )
    assert importer.end_payload == b"end"
    assert stats.num_bytes > len(known_pool().content(ALL))
    assert target.content(ALL) == known_pool().content(ALL)
    target.memory.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_kv_moves_between_processes(transport: str) -> None:
    async with peer("produce", transport, str(NUM_TOKENS)) as (process, address):
        await fetch_all(transport, address)
        await fetch_all(transport, address)
        assert process.stdin is not None
        process.stdin.close()
        assert await process.wait() == 0


@pytest.mark.ucx
@pytest.mark.parametrize("tls", ["tcp", "posix,sysv,self"])
@pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="no ucx extra")
async def test_ucx_over_tcp_and_over_shared_memory(
    tls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", tls)
    async with peer("produce", "ucx", str(NUM_TOKENS), UCX_TLS=tls) as (_, address):
        await fetch_all("ucx", address)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_producer_that_computes_and_is_killed(transport: str) -> None:
    """Waiting for it costs no CPU; its death is told and leaves a valid prefix."""
    target = empty_pool(transport)
    importer = Importer(target.memory, target.block_ids, ALL)
    async with (
        grpc_end(transport, target.memory.device) as consumer,
        peer("produce", transport, "4000") as (
            process,
            address,
        ),
    ):
        there = TransportAddress(transport, address)
        fetching = asyncio.create_task(consumer.fetch(there, make_fetch(NUM_TOKENS), importer))
        while importer.valid_tokens < 4000:
            await asyncio.sleep(0.01)
        before_s = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - before_s < 0.2
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching

        importer = Importer(target.memory, target.block_ids, ALL)
        fetching = asyncio.create_task(consumer.fetch(there, make_fetch(NUM_TOKENS), importer))
        while not importer.valid_tokens:
            await asyncio.sleep(0.001)
        process.kill()
        with pytest.raises(BatonError) as caught:
            await fetching
        assert caught.value.cause is Cause.TRANSPORT_FAILED
        with pytest.raises(BatonError):
            await consumer.fetch(there, make_fetch(1), RecordingSink(1))
        assert not consumer._calls._peers, "a dead peer's connection is kept"  # type: ignore[attr-defined]
    valid = KVRange(0, NUM_LAYERS, 0, importer.valid_tokens)
    assert target.content(valid) == known_pool().content(valid)
    target.memory.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_killed_consumer_ends_the_attachment(transport: str) -> None:
    async def silent(attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
        await asyncio.Event().wait()
        yield ()

    source = ScriptedSource(silent)
    async with grpc_end(transport, known_pool(transport).memory.device) as producer:
        address = (await producer.start(source)).address
        async with peer("consume", transport, address) as (process, _):
            attachment = await source.attachment()
            process.kill()
            await attachment.closed.wait()
            assert not attachment.is_done


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stopped_consumer_does_not_hold_the_producer(transport: str) -> None:
    async def megabytes(attachment: ScriptedAttachment) -> AsyncGenerator[Outgoing, None]:
        await stopped.wait()
        while True:
            yield (bytes(1 << 20),) if device is None else unsealed(device.buffer(1 << 20))

    stopped = asyncio.Event()
    source = ScriptedSource(megabytes)
    device = known_pool(transport).memory.device
    async with grpc_end(transport, device) as producer:
        address = (await producer.start(source)).address
        async with peer("consume", transport, address) as (process, _):
            attachment = await source.attachment()
            process.send_signal(signal.SIGSTOP)
            stopped.set()
            await attachment.yielded.wait()
            attachment.cut.set_result(BatonError(Cause.TRANSFER_STALLED, "no progress"))
            await attachment.closed.wait()
            process.kill()
