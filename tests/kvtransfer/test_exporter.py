"""How the producer cuts KV into frames, what it waits for, and when it stops."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, Cause
from baton.kvtransfer.exporter import Exporter, next_parts
from baton.kvtransfer.frames import Frame, FrameKind, decode
from baton.kvtransfer.progress import KVReady
from baton.types import KVRange
from tests.kvtransfer.support import (
    NUM_LAYERS,
    TOKEN_BYTES,
    Gate,
    Pool,
    Unbounded,
    make_fetch,
    make_pool,
)

CELL_BYTES = TOKEN_BYTES // NUM_LAYERS


@pytest.fixture
def pool() -> Pool:
    return make_pool(16, [3, 4, 0, 6, 1], seed=1)


async def read(exporter: Exporter, num_tokens: int, token_start: int = 0) -> list[Frame]:
    attachment = await exporter.attach(make_fetch(num_tokens, token_start))
    frames = [decode(b"".join(frame)) async for frame in attachment.frames(Unbounded())]
    await attachment.close()
    return frames


@given(st.data())
def test_parts_tile_the_span_within_the_frame_size(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([16, 32]))
    frame_bytes = data.draw(st.integers(1, 200 * CELL_BYTES))
    num_layers = data.draw(st.integers(1, 7))
    start = data.draw(st.integers(0, 100))
    stop = data.draw(st.integers(start + 1, start + 200))
    token, starts = start, []
    while token < stop:
        span = KVRange(0, num_layers, token, stop)
        parts = next_parts(span, block_size, num_layers * (stop - token) * CELL_BYTES, frame_bytes)
        assert {(p.token_start, p.token_stop) for p in parts} == {(token, parts[0].token_stop)}
        layers = [layer for p in parts for layer in range(p.layer_start, p.layer_stop)]
        assert layers == list(range(num_layers))
        for part in parts:
            cells = part.num_layers * part.num_tokens
            assert cells == 1 or cells * CELL_BYTES <= frame_bytes
        starts.append(token)
        token = parts[0].token_stop
    assert token == stop
    if frame_bytes >= block_size * CELL_BYTES:  # a block of a layer fits: cut at blocks only
        assert all(at % block_size == 0 for at in starts[1:])


async def test_everything_that_is_ready_in_as_few_frames_as_the_size_allows(pool: Pool) -> None:
    gate = Gate(pool, num_ready_tokens=70, end_payload=b"first")
    frames = await read(Exporter(pool.memory, gate, frame_bytes=32 * TOKEN_BYTES), 70, 5)
    spans = [(f.range.token_start, f.range.token_stop) for f in frames]
    assert spans == [(5, 32), (32, 64), (64, 70), (5, 70)]
    assert [f.seq for f in frames] == [0, 1, 2, 3]
    assert {f.epoch for f in frames} == {gate.feeds[0].epoch}
    *data, end = frames
    assert all(bytes(f.payload) == pool.content(f.range) for f in data)
    assert (end.kind, bytes(end.payload)) == (FrameKind.END, b"first")
    assert gate.sent == [32, 64, 70]


class Room(Unbounded):
    """Takes everything, and writes down how many frames were asked for at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def take(self, max_frames: int, frame_bytes: int = 0) -> int:
        self.asked.append(max_frames)
        return max_frames


async def test_so_much_is_packed_at_a_time_and_no_more(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.kvtransfer.exporter._MAX_PACKED_BYTES", 33 * TOKEN_BYTES)
    for frame_tokens, at_once in ((16, 2), (32, 1), (64, 1)):
        gate, room = Gate(pool, num_ready_tokens=80, end_payload=b"first"), Room()
        exporter = Exporter(pool.memory, gate, frame_bytes=frame_tokens * TOKEN_BYTES)
        attachment = await exporter.attach(make_fetch(80))
        num_frames = len([frame async for frame in attachment.frames(room)])
        assert max(room.asked) == at_once
        assert num_frames == sum(room.asked) == -(-80 // frame_tokens) + 1


async def test_frames_follow_the_prefill(pool: Pool) -> None:
    gate = Gate(pool, num_ready_tokens=0, end_payload=None)
    attachment = await Exporter(pool.memory, gate).attach(make_fetch(64))
    frames = attachment.frames(Unbounded())
    (feed,) = gate.feeds

    async def next_frame() -> Frame:
        return decode(b"".join(await anext(frames)))

    waiting = asyncio.create_task(next_frame())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    feed.advance(KVReady(20))
    assert (await waiting).range == KVRange(0, NUM_LAYERS, 0, 20)
    feed.advance(KVReady(30))
    feed.advance(KVReady(10))  # an older mark changes nothing
    feed.advance(KVReady(64))
    assert (await next_frame()).range == KVRange(0, NUM_LAYERS, 20, 64)
    waiting = asyncio.create_task(next_frame())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    feed.end(b"x")
    assert (await waiting).kind is FrameKind.END
    await attachment.close()


async def test_layers_leave_while_the_others_are_computed(pool: Pool) -> None:
    gate = Gate(pool, num_ready_tokens=16, end_payload=None)
    attachment = await Exporter(pool.memory, gate).attach(make_fetch(64))
    frames = attachment.frames(Unbounded())
    (feed,) = gate.feeds

    async def next_frame() -> Frame:
        frame = decode(b"".join(await anext(frames)))
        assert frame.kind is FrameKind.END or bytes(frame.payload) == pool.content(frame.range)
        return frame

    assert (await next_frame()).range == KVRange(0, NUM_LAYERS, 0, 16)
    feed.advance(KVReady(16, 50, 1))
    assert (await next_frame()).range == KVRange(0, 1, 16, 50)
    feed.advance(KVReady(16, 50, 2))
    assert (await next_frame()).range == KVRange(1, 2, 16, 50)
    waiting = asyncio.create_task(next_frame())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert set(gate.sent) == {16}, "a token was sent when all its layers were"
    feed.advance(KVReady(50))
    assert (await waiting).range == KVRange(2, NUM_LAYERS, 16, 50)
    feed.advance(KVReady(50, 64, 2))
    feed.advance(KVReady(64))
    feed.end(b"")
    assert (await next_frame()).range == KVRange(0, NUM_LAYERS, 50, 64)
    assert (await next_frame()).kind is FrameKind.END
    await attachment.close()


async def test_a_consumer_that_has_everything_gets_the_end_frame(pool: Pool) -> None:
    gate = Gate(pool, num_ready_tokens=64, end_payload=b"first")
    (frame,) = await read(Exporter(pool.memory, gate), 64, 64)
    assert (frame.kind, frame.range) == (FrameKind.END, KVRange(0, NUM_LAYERS, 64, 64))


async def test_a_refusal_passes_through(pool: Pool) -> None:
    gate = Gate(pool, 0, None)
    gate.refusal = BatonError(Cause.TICKET_EXPIRED, "too late")
    with pytest.raises(BatonError, match="too late"):
        await Exporter(pool.memory, gate).attach(make_fetch(1))


@pytest.mark.parametrize(
    "wrong",
    [
        KVRange(0, 4, 0, 1),
        KVRange(1, 1, 0, 1),
        KVRange(0, 1, 0, 1, 1, 3),
        KVRange(0, 1, 0, 1, 2, 1),
    ],
)
async def test_kv_that_the_pool_does_not_have(pool: Pool, wrong: KVRange) -> None:
    gate = Gate(pool, 64, b"")
    with pytest.raises(BatonError, match="no such KV") as caught:
        await Exporter(pool.memory, gate).attach(replace(make_fetch(1), range=wrong))
    assert caught.value.cause is Cause.PROTOCOL
    assert gate.feeds == []


@pytest.mark.parametrize("num_ready_tokens", [0, 64])
async def test_a_cut_attachment_raises_its_cause(pool: Pool, num_ready_tokens: int) -> None:
    gate = Gate(pool, num_ready_tokens, end_payload=None)
    attachment = await Exporter(pool.memory, gate, 1000).attach(make_fetch(64))
    failing = asyncio.create_task(attachment.failed())
    frames = attachment.frames(Unbounded())
    if num_ready_tokens:
        await anext(frames)
    gate.feeds[0].cut(BatonError(Cause.LEASE_UNKNOWN, "evicted"))
    gate.feeds[0].cut(BatonError(Cause.INTERNAL, "later"))
    with pytest.raises(BatonError, match="evicted"):
        await anext(frames)
    assert (await failing).cause is Cause.LEASE_UNKNOWN
    await attachment.close()


async def test_close_waits_for_the_reading_and_tells_once(pool: Pool) -> None:
    gate = Gate(pool, num_ready_tokens=64, end_payload=b"")
    attachment = await Exporter(pool.memory, gate).attach(make_fetch(64))
    blocked, go = asyncio.Event(), asyncio.Event()
    loop, pack = asyncio.get_running_loop(), pool.memory.pack

    def slow_pack(*args: Any, **kwargs: Any) -> memoryview:
        loop.call_soon_threadsafe(blocked.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        return pack(*args, **kwargs)

    pool.memory.pack = slow_pack  # type: ignore[method-assign]
    reading = asyncio.create_task(anext(attachment.frames(Unbounded())))
    await blocked.wait()
    closing = [asyncio.create_task(attachment.close()) for _ in range(2)]
    await asyncio.sleep(0.02)
    assert gate.told == []
    go.set()
    await asyncio.gather(*closing)
    assert gate.told == [("closed", attachment.epoch)]
    with pytest.raises(BatonError, match="the reader is gone"):
        await reading
    await attachment.close()
    assert gate.told == [("closed", attachment.epoch)]


async def test_nothing_is_packed_after_a_cut(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut while it waits for the consumer's credit."""
    room, packed = asyncio.Event(), []

    class Full(Unbounded):
        async def take(self, max_frames: int, frame_bytes: int = 0) -> int:
            await room.wait()
            return max_frames

    gate = Gate(pool, 64, end_payload=None)
    attachment = await Exporter(pool.memory, gate, 1000).attach(make_fetch(64))
    monkeypatch.setattr(attachment, "_pack", lambda *asked: packed.append(asked))
    first = asyncio.create_task(anext(attachment.frames(Full())))
    await asyncio.sleep(0)
    gate.feeds[0].cut(BatonError(Cause.LEASE_UNKNOWN, "evicted"))
    room.set()
    with pytest.raises(BatonError, match="evicted"):
        await first
    assert not packed
    await attachment.close()
