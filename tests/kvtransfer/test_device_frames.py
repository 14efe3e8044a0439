"""Payloads that stay in device memory: their frames, and the transport that moves them. Where there
is no CUDA device, the CPU's memory is treated as one."""

import asyncio
import importlib.util
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from baton.errors import BatonError, Cause
from baton.kernels.payload_digest import payload_digests
from baton.kvtransfer.base import DeviceFrame, Outgoing
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.frames import (
    HEADER_BYTES,
    FrameReader,
    FrameWriter,
    decode,
    decode_beside,
    encode_beside,
    unsealed,
)
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.probe import ProbedSource, probe
from baton.kvtransfer.progress import KVReady
from baton.types import KVRange, TransportAddress
from tests.kvtransfer.support import (
    NUM_LAYERS,
    Gate,
    Pair,
    Pool,
    RecordingSink,
    ScriptedAttachment,
    ScriptedSource,
    grpc_end,
    make_fetch,
    make_layout,
    make_pool,
    on_device,
)

WHERE = KVRange(0, NUM_LAYERS, 0, 16)
needs_ucx = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="the ucx extra is not installed"
)


def device_pool(block_size: int = 16, num_blocks: int = 7, seed: int = 1) -> Pool:
    return on_device(make_pool(block_size, [*range(num_blocks - 1, -1, -1)], seed))


def data_frame(pool: Pool, where: KVRange = WHERE, epoch: int = 5) -> tuple[DeviceFrame, int]:
    assert pool.memory.device is not None
    ((payload, digest),) = pool.memory.device.pack_here(
        pool.block_ids, [where], pool.memory.device.buffer
    )
    return FrameWriter(epoch).beside(where, payload, digest), digest


# ── frames ───────────────────────────────────────────────────────────────────────────────────────


def test_vector() -> None:
    """A contract between versions."""
    payload = torch.arange(64, dtype=torch.uint8)
    digest = payload_digests([payload]).item() % 2**64
    frame = encode_beside(0x1122334455667788, 3, KVRange(1, 2, 16, 17, 4, 6), payload, digest)
    assert bytes(frame.header).hex() == (
        "424b560101014000400000000300000088776655443322110100000002000000"
        "100000001100000004000000060000000000000000000000f44eb3df95af7882"
    )


def test_a_frame_is_decoded_and_its_payload_not_copied() -> None:
    frame, digest = data_frame(device_pool())
    decoded = FrameReader(5).accept(frame, digest)
    assert (decoded.epoch, decoded.seq, decoded.range) == (5, 0, WHERE)
    assert decoded.payload is frame.payload


def test_damage_is_seen() -> None:
    frame, digest = data_frame(device_pool())
    for bit in range(8 * HEADER_BYTES):
        header = bytearray(frame.header)
        header[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BatonError) as caught:
            decode_beside(DeviceFrame(memoryview(header), frame.payload), digest)
        assert caught.value.cause in (Cause.FRAME_CORRUPT, Cause.FRAME_TRUNCATED)
    with pytest.raises(BatonError, match="checksum"):
        decode_beside(frame, digest ^ 1)
    with pytest.raises(BatonError) as caught:
        decode_beside(DeviceFrame(frame.header, frame.payload[:-4]), digest)
    assert caught.value.cause is Cause.FRAME_TRUNCATED


def test_the_two_places_are_not_confused() -> None:
    frame, _ = data_frame(device_pool())
    with pytest.raises(BatonError) as caught:
        decode(bytes(frame.header) + frame.payload.cpu().numpy().tobytes())
    assert caught.value.cause is Cause.FRAME_CORRUPT
    (header, _) = FrameWriter(5).end(WHERE, b"end")
    with pytest.raises(BatonError) as caught:
        decode_beside(DeviceFrame(bytes(header), torch.empty(3, dtype=torch.uint8)), 0)
    assert caught.value.cause is Cause.FRAME_CORRUPT


@pytest.mark.parametrize("damage", ["a bit", "a byte too few", "two words swapped"])
async def test_a_damaged_payload_is_never_written(damage: str) -> None:
    source, target = device_pool(), device_pool(32, 4, seed=2)
    before = target.content(WHERE)
    frame, _ = data_frame(source)
    payload = frame.payload.clone()
    if damage == "a bit":
        payload[100] ^= 4
    elif damage == "a byte too few":
        payload = payload[:-1]
    else:
        payload.view(torch.int32)[:2] = payload.view(torch.int32)[:2].flip(0)
    importer = Importer(target.memory, target.block_ids, WHERE)
    importer.opened(5, 16)
    with pytest.raises(BatonError) as caught:
        await importer.frame(replace(frame, payload=payload))
    assert caught.value.cause is Cause.FRAME_CORRUPT
    assert importer.valid_tokens == 0
    assert target.content(WHERE) == before
    importer = Importer(target.memory, target.block_ids, WHERE)
    importer.opened(5, 16)
    await importer.frame(frame)
    assert importer.valid_tokens == 16
    assert target.content(WHERE) == source.content(WHERE)


# ── the transport ────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    async with (
        grpc_end("cuda", device_pool().memory.device) as producer,
        grpc_end("cuda", device_pool().memory.device) as consumer,
    ):
        yield Pair(producer, consumer)


async def endless(attachment: ScriptedAttachment) -> AsyncGenerator[Outgoing, None]:
    """Host and device frames by turns, numbered in the payload."""
    while True:
        number = attachment.num_yielded
        if number % 3 == 2:
            yield (bytes(HEADER_BYTES), number.to_bytes(4, "little"))
        else:
            payload = torch.full((1000,), number % 256, dtype=torch.uint8)
            yield unsealed(payload.cuda() if torch.cuda.is_available() else payload)


@needs_ucx
@pytest.mark.parametrize("credit", [1, 2, 5])
async def test_order_and_credit(credit: int) -> None:
    source, hold = ScriptedSource(endless), asyncio.Event()
    sink = RecordingSink(40, hold=hold)
    async with pair() as ends:
        peer = await ends.producer.start(source)
        fetch = make_fetch(1, initial_credit=credit)
        fetching = asyncio.create_task(ends.consumer.fetch(peer, fetch, sink))
        await sink.entered.wait()
        attachment = source.attachments[0]
        while attachment.num_yielded < credit:
            await asyncio.sleep(0.002)
        for _ in range(10):
            await asyncio.sleep(0.005)
            assert attachment.num_yielded <= credit
        hold.set()
        stats = await fetching
        assert [frame[HEADER_BYTES] for frame in sink.frames] == list(range(40))
        assert {len(frame) for frame in sink.frames} == {HEADER_BYTES + 4, HEADER_BYTES + 1000}
        assert stats.transport == "cuda"
        assert stats.num_bytes >= sum(map(len, sink.frames))


@needs_ucx
async def test_cancelling_while_payloads_pour_in() -> None:
    source = ScriptedSource(endless)
    async with pair() as ends:
        peer = await ends.producer.start(source)
        for num_wanted in (1, 2, 3, 5, 8):
            sink = RecordingSink(1000)
            fetching = asyncio.create_task(ends.consumer.fetch(peer, make_fetch(1), sink))
            while len(sink.frames) < num_wanted:
                await asyncio.sleep(0)
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            num_frames = len(sink.frames)
            await source.attachments[-1].closed.wait()
            assert len(sink.frames) == num_frames
            assert [frame[HEADER_BYTES] for frame in sink.frames] == list(range(num_frames))


@needs_ucx
@pytest.mark.parametrize(("producer_block", "consumer_block"), [(16, 32), (32, 16)])
async def test_kv_moves_while_it_is_computed(producer_block: int, consumer_block: int) -> None:
    source, target = device_pool(producer_block), device_pool(consumer_block, seed=2)
    where = KVRange(0, NUM_LAYERS, 16, 101)
    async with (
        grpc_end("cuda", source.memory.device) as producer,
        grpc_end("cuda", target.memory.device) as consumer,
    ):
        gate = Gate(source, num_ready_tokens=40, end_payload=None)
        peer = await producer.start(Exporter(source.memory, gate, frame_bytes=4000))
        importer = Importer(target.memory, target.block_ids, where)
        fetching = asyncio.create_task(
            consumer.fetch(peer, make_fetch(101, token_start=16), importer)
        )
        while importer.valid_tokens < 40:
            await asyncio.sleep(0.001)
        gate.feeds[0].advance(KVReady(101))
        gate.feeds[0].end(b"first tokens")
        stats = await fetching
    assert (importer.valid_tokens, importer.end_payload) == (101, b"first tokens")
    assert (stats.transport, stats.num_tokens) == ("cuda", 85)
    assert target.content(where) == source.content(where)


@needs_ucx
async def test_a_device_without_memory_costs_one_fetch() -> None:
    class Full:
        is_full = False

        def buffer(self, num_bytes: int) -> torch.Tensor:
            if self.is_full and num_bytes:
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert device is not None
            return device.buffer(num_bytes)

    device, full = device_pool().memory.device, Full()
    async with grpc_end("cuda", device) as producer, grpc_end("cuda", full) as consumer:
        peer = await producer.start(ScriptedSource(endless))
        full.is_full = True
        with pytest.raises(BatonError) as caught:
            await consumer.fetch(peer, make_fetch(1), RecordingSink(10))
        assert caught.value.cause is Cause.NO_ROOM
        full.is_full = False
        await consumer.fetch(peer, make_fetch(1), RecordingSink(10))


@needs_ucx
async def test_a_probe_moves_device_memory() -> None:
    async with pair() as ends:
        peer = await ends.producer.start(ProbedSource(ScriptedSource(endless)))
        for num_bytes in (1, (2 << 20) + 1):
            stats = await probe(ends.consumer, peer, make_layout(), "d0", num_bytes, 30.0)
            assert stats.num_bytes == num_bytes


@needs_ucx
async def test_it_reaches_no_other_host() -> None:
    async with pair() as ends:
        peer = await ends.producer.start(ScriptedSource(endless))
        assert ends.consumer.reaches(peer)
        host = peer.address.partition("/")[0]
        for address in (host, f"{host}/00000000-0000-0000-0000-000000000000"):
            assert not ends.consumer.reaches(TransportAddress("cuda", address))
