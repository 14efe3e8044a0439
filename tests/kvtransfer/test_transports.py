"""Every guarantee of `baton.kvtransfer.base`, against every transport."""

import asyncio
import importlib.util
import random
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Buffers
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.probe import ProbedSource, probe
from baton.kvtransfer.progress import KVReady
from baton.types import KVRange, TransportAddress
from tests.kvtransfer.support import (
    NUM_LAYERS,
    TOKEN_BYTES,
    Gate,
    Pair,
    RecordingSink,
    ScriptedAttachment,
    ScriptedSource,
    connected,
    frames_script,
    make_fetch,
    make_layout,
    make_pool,
)

TRANSPORTS = [
    "local",
    "grpc",
    "shm",
    pytest.param(
        "ucx",
        marks=[
            pytest.mark.ucx,
            pytest.mark.skipif(
                importlib.util.find_spec("ucxx") is None, reason="the ucx extra is not installed"
            ),
        ],
    ),
]


@pytest.fixture(params=TRANSPORTS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with connected(request.param) as transports:
        yield transports


async def endless(attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
    while True:
        yield (attachment.num_yielded.to_bytes(4, "little"), bytes(1000))


async def silent(_attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
    yield (b"only one",)
    await asyncio.Event().wait()


def some_frames(seed: int, sizes: list[int]) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(size) for size in sizes]


async def test_frames_arrive_whole_in_order_and_once(pair: Pair) -> None:
    frames = some_frames(1, [64, 65, 1, 300_000, 2 << 20, 100, *range(64, 64 + 60)])
    source, sink = ScriptedSource(frames_script(frames)), RecordingSink(len(frames))
    peer = await pair.producer.start(source)
    stats = await pair.consumer.fetch(peer, make_fetch(9), sink)
    assert sink.frames == frames
    assert sink.epoch == source.attachments[0].epoch
    assert (stats.num_frames, stats.num_bytes) == (len(frames), sum(map(len, frames)))
    assert stats.transport == pair.consumer.name == peer.name
    assert stats.num_tokens == 9
    await source.attachments[0].closed.wait()
    assert source.attachments[0].is_done


async def test_the_producer_learns_what_the_consumer_asks_and_claims(pair: Pair) -> None:
    source = ScriptedSource(frames_script([b"x"]))
    peer = await pair.producer.start(source)
    fetch = make_fetch(50, token_start=16, initial_credit=3, consumer="decode-7")
    await pair.consumer.fetch(peer, fetch, RecordingSink(1))
    assert source.fetches == [fetch]


@pytest.mark.parametrize("credit", [1, 2, 5])
async def test_no_more_frames_in_flight_than_credit(pair: Pair, credit: int) -> None:
    source, hold = ScriptedSource(endless), asyncio.Event()
    sink = RecordingSink(40, hold=hold)
    peer = await pair.producer.start(source)
    fetch = make_fetch(1, initial_credit=credit)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, fetch, sink))
    await sink.entered.wait()
    attachment = source.attachments[0]
    while attachment.num_yielded < credit:
        await asyncio.sleep(0.002)
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert attachment.num_yielded <= credit
    hold.set()
    await fetching
    assert [int.from_bytes(f[:4], "little") for f in sink.frames] == list(range(40))
    assert attachment.num_yielded <= 40 + credit


async def test_cancelling_the_fetch_ends_the_attachment(pair: Pair) -> None:
    source, sink = ScriptedSource(silent), RecordingSink(5)
    peer = await pair.producer.start(source)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, make_fetch(1), sink))
    await sink.entered.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await source.attachments[0].closed.wait()
    assert not source.attachments[0].is_done


async def test_cancelling_while_frames_pour_in(pair: Pair) -> None:
    source = ScriptedSource(endless)
    peer = await pair.producer.start(source)
    for num_wanted in (1, 2, 3, 5, 8):
        sink = RecordingSink(1000)
        fetching = asyncio.create_task(pair.consumer.fetch(peer, make_fetch(1), sink))
        while len(sink.frames) < num_wanted:
            await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        num_frames = len(sink.frames)
        await source.attachments[-1].closed.wait()
        assert len(sink.frames) == num_frames


@pytest.mark.parametrize("num_turns", range(4))
async def test_cancelling_again_while_it_ends(pair: Pair, num_turns: int) -> None:
    """Whoever is in a hurry does not cut short what has to be told."""
    source = ScriptedSource(silent)
    peer = await pair.producer.start(source)
    sink = RecordingSink(5)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, make_fetch(1), sink))
    await sink.entered.wait()
    fetching.cancel()
    for _ in range(num_turns):
        await asyncio.sleep(0)
        fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    async with asyncio.timeout(30):
        await source.attachments[0].closed.wait()


async def test_a_refusal_arrives_with_its_cause(pair: Pair) -> None:
    source = ScriptedSource(silent)
    peer = await pair.producer.start(source)
    for cause in (Cause.TICKET_EXPIRED, Cause.LEASE_UNKNOWN, Cause.DRAINING):
        source.refusal = BatonError(cause, "refused by the source")
        with pytest.raises(BatonError) as caught:
            await pair.consumer.fetch(peer, make_fetch(1), RecordingSink(1))
        assert (caught.value.cause, caught.value.message) == (cause, "refused by the source")


async def test_a_producer_that_fails_midway_is_told_to_the_consumer(pair: Pair) -> None:
    async def script(_attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
        yield (b"one",)
        raise BatonError(Cause.LEASE_UNKNOWN, "evicted")

    source, sink = ScriptedSource(script), RecordingSink(5)
    peer = await pair.producer.start(source)
    with pytest.raises(BatonError) as caught:
        await pair.consumer.fetch(peer, make_fetch(1), sink)
    assert (caught.value.cause, caught.value.message) == (Cause.LEASE_UNKNOWN, "evicted")
    await source.attachments[0].closed.wait()


async def test_an_unexpected_exception_of_the_producer_is_internal(pair: Pair) -> None:
    async def script(_attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
        yield (b"one",)
        raise KeyError("a bug")

    source = ScriptedSource(script)
    peer = await pair.producer.start(source)
    with pytest.raises(BatonError) as caught:
        await pair.consumer.fetch(peer, make_fetch(1), RecordingSink(5))
    assert caught.value.cause is Cause.INTERNAL
    await source.attachments[0].closed.wait()


async def test_a_lease_lost_while_the_consumer_gives_no_credit(pair: Pair) -> None:
    source, hold = ScriptedSource(endless), asyncio.Event()
    sink = RecordingSink(100, hold=hold)
    peer = await pair.producer.start(source)
    fetch = make_fetch(1, initial_credit=1)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, fetch, sink))
    await sink.entered.wait()
    source.attachments[0].cut.set_result(BatonError(Cause.TRANSFER_STALLED, "cut"))
    await source.attachments[0].closed.wait()  # although the consumer is still at the first frame
    hold.set()
    with pytest.raises(BatonError) as caught:
        await fetching
    assert (caught.value.cause, caught.value.message) == (Cause.TRANSFER_STALLED, "cut")


async def test_a_frame_that_the_sink_rejects_ends_the_fetch(pair: Pair) -> None:
    source, sink = ScriptedSource(endless), RecordingSink(100, reject_at=3)
    peer = await pair.producer.start(source)
    with pytest.raises(BatonError, match="rejected by the sink") as caught:
        await pair.consumer.fetch(peer, make_fetch(1), sink)
    assert caught.value.cause is Cause.FRAME_CORRUPT
    await source.attachments[0].closed.wait()
    assert not source.attachments[0].is_done
    assert len(sink.frames) == 3


async def test_nothing_writes_to_the_sink_after_the_fetch(pair: Pair) -> None:
    source, hold = ScriptedSource(endless), asyncio.Event()
    sink = RecordingSink(100, hold=hold)
    peer = await pair.producer.start(source)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, make_fetch(1), sink))
    await sink.entered.wait()
    fetching.cancel()
    await asyncio.sleep(0.05)
    assert not fetching.done(), "the sink is still writing"
    hold.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert not sink.is_busy
    num_frames = len(sink.frames)
    await source.attachments[0].closed.wait()
    assert len(sink.frames) == num_frames


async def test_a_silent_producer_is_given_up(pair: Pair) -> None:
    source, sink = ScriptedSource(silent), RecordingSink(2, patience=0.05)
    peer = await pair.producer.start(source)
    with pytest.raises(BatonError) as caught:
        await pair.consumer.fetch(peer, make_fetch(1), sink)
    assert caught.value.cause is Cause.TRANSFER_STALLED
    await source.attachments[0].closed.wait()


async def test_frames_that_end_too_early_are_an_error(pair: Pair) -> None:
    source, sink = ScriptedSource(frames_script([b"one"])), RecordingSink(2, patience=0.2)
    peer = await pair.producer.start(source)
    with pytest.raises(BatonError) as caught:
        await pair.consumer.fetch(peer, make_fetch(1), sink)
    assert caught.value.cause in (Cause.TRANSFER_STALLED, Cause.FRAME_TRUNCATED)
    await source.attachments[0].closed.wait()
    assert not source.attachments[0].is_done


async def test_two_attachments_of_one_lease_at_once(pair: Pair) -> None:
    frames = some_frames(2, [70_000] * 12)
    source = ScriptedSource(frames_script(frames))
    peer = await pair.producer.start(source)
    hold = asyncio.Event()
    paused, free = RecordingSink(12, hold=hold), RecordingSink(12)
    pausing = asyncio.create_task(pair.consumer.fetch(peer, make_fetch(1), paused))
    await paused.entered.wait()
    await pair.consumer.fetch(peer, make_fetch(1), free)
    assert not pausing.done()
    hold.set()
    await pausing
    assert paused.frames == free.frames == frames
    assert paused.epoch != free.epoch


async def test_many_fetches_at_once(pair: Pair) -> None:
    frames = some_frames(3, [5_000] * 20)
    peer = await pair.producer.start(ScriptedSource(frames_script(frames)))
    sinks = [RecordingSink(20) for _ in range(12)]
    await asyncio.gather(*(pair.consumer.fetch(peer, make_fetch(1), sink) for sink in sinks))
    assert all(sink.frames == frames for sink in sinks)


async def test_after_a_failed_fetch_the_next_one_works(pair: Pair) -> None:
    frames = some_frames(4, [200_000] * 20)
    source = ScriptedSource(frames_script(frames))
    peer = await pair.producer.start(source)
    for reject_at in (0, 1, 7):
        with pytest.raises(BatonError, match="rejected"):
            await pair.consumer.fetch(peer, make_fetch(1), RecordingSink(20, reject_at=reject_at))
        sink = RecordingSink(20)
        await pair.consumer.fetch(peer, make_fetch(1), sink)
        assert sink.frames == frames
    for attachment in source.attachments:
        await attachment.closed.wait()


async def test_closing_the_consumer_ends_its_fetches(pair: Pair) -> None:
    source, sink = ScriptedSource(silent), RecordingSink(2)
    peer = await pair.producer.start(source)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, make_fetch(1), sink))
    await sink.entered.wait()
    await pair.consumer.close()
    with pytest.raises(BatonError) as caught:
        await fetching
    assert caught.value.cause is Cause.TRANSPORT_FAILED
    await source.attachments[0].closed.wait()
    with pytest.raises(BatonError, match="closed"):
        await pair.consumer.fetch(peer, make_fetch(1), RecordingSink(1))
    await pair.consumer.close()


async def test_closing_the_producer_ends_its_attachments(pair: Pair) -> None:
    source, sink = ScriptedSource(silent), RecordingSink(2)
    peer = await pair.producer.start(source)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, make_fetch(1), sink))
    await sink.entered.wait()
    await pair.producer.close()
    assert source.attachments[0].closed.is_set()
    with pytest.raises(BatonError) as caught:
        await fetching
    assert caught.value.cause is Cause.TRANSPORT_FAILED


async def test_a_probe_moves_zeros_and_touches_no_attachment(pair: Pair) -> None:
    source = ScriptedSource(frames_script([b"x"]))
    peer = await pair.producer.start(ProbedSource(source))
    for num_bytes in (1, (2 << 20) + 1):
        stats = await probe(pair.consumer, peer, make_layout(), "d0", num_bytes, 30.0)
        assert stats.num_bytes == num_bytes
        assert stats.duration_ms > 0
    assert source.attachments == []
    with pytest.raises(BatonError) as caught:
        await probe(pair.consumer, peer, make_layout(), "d0", 1 << 30, 30.0)
    assert caught.value.cause is Cause.PROTOCOL
    await pair.consumer.fetch(peer, make_fetch(1), RecordingSink(1))
    assert len(source.attachments) == 1


async def test_one_probe_at_a_time_the_others_wait(pair: Pair) -> None:
    source = ProbedSource(ScriptedSource(silent))
    peer = await pair.producer.start(source)
    running: list[int] = []

    async def one(number: int) -> None:
        await probe(pair.consumer, peer, make_layout(), "d0", 4 << 20, 30.0)
        running.append(source._num_probes)

    async with source._turn:
        probes = asyncio.gather(*map(one, range(5)))
        async with asyncio.timeout(30.0):
            while source._num_probes < 5:
                await asyncio.sleep(0.01)
    await probes
    assert running == sorted(running, reverse=True)
    async with asyncio.timeout(30.0):
        while source._num_probes:
            await asyncio.sleep(0.01)
    assert not source._turn.locked()


async def test_a_probe_that_nobody_serves_ends_in_time(pair: Pair) -> None:
    source = ProbedSource(ScriptedSource(silent))
    peer = await pair.producer.start(source)
    async with source._turn:
        with pytest.raises(TimeoutError):
            await probe(pair.consumer, peer, make_layout(), "d0", 1, timeout_s=0.2)
    await probe(pair.consumer, peer, make_layout(), "d0", 1, 30.0)


async def test_nobody_there(pair: Pair) -> None:
    with pytest.raises(BatonError) as caught:
        await pair.consumer.fetch(
            TransportAddress(pair.consumer.name, "127.0.0.1:1"), make_fetch(1), RecordingSink(1)
        )
    assert caught.value.cause is Cause.TRANSPORT_FAILED


@pytest.mark.parametrize("credit", [0, 65])
async def test_impossible_credit_is_refused(pair: Pair, credit: int) -> None:
    peer = await pair.producer.start(ScriptedSource(silent))
    with pytest.raises(BatonError) as caught:
        await pair.consumer.fetch(peer, make_fetch(1, initial_credit=credit), RecordingSink(1))
    assert caught.value.cause is Cause.PROTOCOL


# ── pool to pool ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("producer_block", "consumer_block"), [(16, 16), (16, 32), (32, 16)])
async def test_kv_moves_from_pool_to_pool_while_it_is_computed(
    pair: Pair, producer_block: int, consumer_block: int
) -> None:
    source = make_pool(producer_block, [7, 8, 2, 9, 0, 4, 1], seed=1)
    target = make_pool(consumer_block, [3, 5, 6, 1, 0, 2, 4], seed=2)
    where = KVRange(0, NUM_LAYERS, 16, 101)
    before = target.content(KVRange(0, NUM_LAYERS, 0, 16))
    gate = Gate(source, num_ready_tokens=40, end_payload=None)
    peer = await pair.producer.start(Exporter(source.memory, gate, frame_bytes=4000))
    importer = Importer(target.memory, target.block_ids, where)
    fetch = make_fetch(101, token_start=16)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, fetch, importer))
    while importer.valid_tokens < 40:
        await asyncio.sleep(0.001)
    (feed,) = gate.feeds
    feed.advance(KVReady(64))
    while importer.valid_tokens < 64:
        await asyncio.sleep(0.001)
    assert not importer.is_complete
    feed.advance(KVReady(64, 101, 2))
    bytes_before = importer.num_bytes
    while importer.num_bytes < bytes_before + 2 * 37 * TOKEN_BYTES // NUM_LAYERS:
        await asyncio.sleep(0.001)
    assert importer.valid_tokens == 64
    feed.advance(KVReady(101))
    feed.end(b"first tokens")
    stats = await fetching
    assert importer.is_complete
    assert (importer.valid_tokens, importer.end_payload) == (101, b"first tokens")
    assert stats.num_tokens == 85
    assert target.content(where) == source.content(where)
    assert target.content(KVRange(0, NUM_LAYERS, 0, 16)) == before
    while len(gate.told) < 2:
        await asyncio.sleep(0.001)
    assert gate.told == [("done", feed.epoch), ("closed", feed.epoch)]
    source.memory.close()
    target.memory.close()


async def test_a_lease_lost_midway_leaves_a_valid_prefix(pair: Pair) -> None:
    source, target = make_pool(16, range(7), seed=1), make_pool(16, range(7), seed=2)
    gate = Gate(source, num_ready_tokens=48, end_payload=None)
    peer = await pair.producer.start(Exporter(source.memory, gate, frame_bytes=2000))
    where = KVRange(0, NUM_LAYERS, 0, 100)
    importer = Importer(target.memory, target.block_ids, where)
    fetching = asyncio.create_task(pair.consumer.fetch(peer, make_fetch(100), importer))
    while importer.valid_tokens < 48:
        await asyncio.sleep(0.001)
    gate.feeds[0].advance(KVReady(48, 90, NUM_LAYERS - 1))
    await asyncio.sleep(0.05)  # for some of it, at least
    gate.feeds[0].cut(BatonError(Cause.LEASE_UNKNOWN, "evicted"))
    with pytest.raises(BatonError, match="evicted"):
        await fetching
    valid = KVRange(0, NUM_LAYERS, 0, importer.valid_tokens)
    assert importer.valid_tokens == 48
    assert target.content(valid) == source.content(valid)
    while not gate.told:
        await asyncio.sleep(0.001)
    assert gate.told == [("closed", gate.feeds[0].epoch)]
    source.memory.close()
    target.memory.close()
