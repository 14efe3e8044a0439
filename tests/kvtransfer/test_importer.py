"""What the consumer believes, what it writes, and how long it waits."""

import asyncio
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BatonError, Cause
from baton.kvtransfer.frames import HEADER_BYTES, FrameWriter
from baton.kvtransfer.importer import Importer
from baton.types import KVRange
from tests.kvtransfer.support import NUM_LAYERS, TOKEN_BYTES, Pool, make_pool

EPOCH = 9
ALL = KVRange(0, NUM_LAYERS, 16, 64)


@pytest.fixture
def source() -> Pool:
    return make_pool(16, [4, 2, 5, 0], seed=1)


@pytest.fixture
def target() -> Pool:
    return make_pool(32, [1, 3], seed=2)


def framed(writer: FrameWriter, where: KVRange, payload: bytes) -> bytes:
    return b"".join(writer.data(where, memoryview(bytearray(HEADER_BYTES) + payload)))


def data_frame(writer: FrameWriter, source: Pool, where: KVRange) -> bytes:
    return framed(writer, where, source.content(where))


def open_importer(target: Pool, where: KVRange = ALL) -> Importer:
    importer = Importer(target.memory, target.block_ids, where)
    importer.opened(EPOCH, where.token_stop)
    return importer


async def refused(importer: Importer, data: bytes) -> Cause:
    valid = importer.valid_tokens
    with pytest.raises(BatonError) as caught:
        await importer.frame(data)
    assert importer.valid_tokens == valid
    assert not importer.is_complete
    return caught.value.cause


async def test_layers_may_arrive_apart(source: Pool, target: Pool) -> None:
    importer, writer = open_importer(target), FrameWriter(EPOCH)
    steps = [
        (KVRange(0, 2, 16, 40), 16),
        (KVRange(2, 3, 16, 30), 30),
        (KVRange(0, 1, 40, 64), 30),
        (KVRange(2, 3, 30, 64), 40),
        (KVRange(1, 2, 40, 64), 64),
    ]
    for where, valid in steps:
        assert not await importer.frame(data_frame(writer, source, where))
        assert importer.valid_tokens == valid
    assert await importer.frame(b"".join(writer.end(ALL, b"tokens")))
    assert (importer.is_complete, importer.end_payload) == (True, b"tokens")
    assert target.content(ALL) == source.content(ALL)


async def test_a_call_returns_when_the_device_has_written(
    source: Pool, target: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a later frame of the same call was refused."""
    importer, writer, events = open_importer(target), FrameWriter(EPOCH), []
    unpack = target.memory.unpack

    def unpacking(*args: object) -> None:
        events.append("unpacked")
        unpack(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(target.memory, "unpack", unpacking)
    monkeypatch.setattr(target.memory, "settle", lambda: events.append("settled"))
    halves = KVRange(0, NUM_LAYERS, 16, 32), KVRange(0, NUM_LAYERS, 32, 48)
    await importer.frame(*(data_frame(writer, source, where) for where in halves))
    assert events == ["unpacked", "unpacked", "settled"]
    with pytest.raises(BatonError):
        await importer.frame(
            data_frame(writer, source, KVRange(0, NUM_LAYERS, 48, 56)),
            data_frame(writer, source, halves[0]),
        )
    assert events[3:] == ["unpacked", "settled"]


async def test_the_end_does_not_queue_behind_what_others_copy(source: Pool, target: Pool) -> None:
    importer, writer, go_on = open_importer(target), FrameWriter(EPOCH), threading.Event()
    await importer.frame(data_frame(writer, source, ALL))
    copying = asyncio.create_task(target.memory.run(go_on.wait, 20))
    await asyncio.sleep(0.05)  # the transfer thread is at it
    try:
        async with asyncio.timeout(10):
            assert await importer.frame(b"".join(writer.end(ALL, b"tokens")))
    finally:
        go_on.set()
        assert await copying


async def test_nothing_but_the_end_frame_is_wanted(target: Pool) -> None:
    nothing = KVRange(0, NUM_LAYERS, 64, 64)
    importer = open_importer(target, nothing)
    assert importer.patience_s() is None
    assert await importer.frame(b"".join(FrameWriter(EPOCH).end(nothing, b"tokens")))
    assert importer.valid_tokens == 64


@pytest.mark.parametrize(
    "wrong",
    [
        KVRange(0, 3, 17, 32),  # a hole
        KVRange(0, 3, 15, 32),  # overlaps what is there
        KVRange(0, 3, 16, 65),  # beyond what was reserved
        KVRange(0, 4, 16, 32),  # a layer too many
        KVRange(0, 3, 16, 32, 0, 1),  # other heads
        KVRange(0, 3, 0, 16),  # what was not asked for
    ],
)
async def test_wrong_ranges_write_nothing(source: Pool, target: Pool, wrong: KVRange) -> None:
    importer, before = open_importer(target), target.cache.clone()
    frame = framed(FrameWriter(EPOCH), wrong, bytes(wrong.num_tokens * 192))
    assert await refused(importer, frame) is Cause.FRAME_ORDER
    assert target.cache.equal(before)


async def test_damage_writes_nothing(source: Pool, target: Pool) -> None:
    before = target.cache.clone()
    good = data_frame(FrameWriter(EPOCH), source, replace(ALL, token_stop=32))
    for at in (0, 5, 30, 60, 64, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        cause = await refused(open_importer(target), bytes(bad))
        assert cause in (Cause.FRAME_CORRUPT, Cause.FRAME_TRUNCATED)
    assert await refused(open_importer(target), good[:-1]) is Cause.FRAME_TRUNCATED
    other = data_frame(FrameWriter(EPOCH + 1), source, replace(ALL, token_stop=32))
    assert await refused(open_importer(target), other) is Cause.EPOCH_MISMATCH
    assert target.cache.equal(before)


async def test_a_payload_of_another_size_than_its_ranges(target: Pool) -> None:
    frame = framed(FrameWriter(EPOCH), ALL, bytes(48 * TOKEN_BYTES - 1))
    assert await refused(open_importer(target), frame) is Cause.FRAME_CORRUPT


async def test_the_end_must_fit_what_came(source: Pool, target: Pool) -> None:
    importer, writer = open_importer(target), FrameWriter(EPOCH)
    early = b"".join(FrameWriter(EPOCH).end(ALL, b""))
    assert await refused(importer, early) is Cause.FRAME_ORDER
    importer = open_importer(target)
    await importer.frame(data_frame(writer, source, ALL))
    other = b"".join(writer.end(replace(ALL, token_start=0), b""))
    assert await refused(importer, other) is Cause.FRAME_ORDER


async def test_nothing_is_taken_before_opening_or_after_the_end(source: Pool, target: Pool) -> None:
    writer = FrameWriter(EPOCH)
    frame = data_frame(writer, source, ALL)
    closed = Importer(target.memory, target.block_ids, ALL)
    assert await refused(closed, frame) is Cause.FRAME_ORDER
    importer = open_importer(target)
    await importer.frame(frame)
    await importer.frame(b"".join(writer.end(ALL, b"")))
    with pytest.raises(BatonError, match="after the end"):
        await importer.frame(b"".join(writer.end(ALL, b"")))
    with pytest.raises(BatonError, match="twice"):
        importer.opened(EPOCH, 64)


@settings(deadline=None, max_examples=50)
@given(st.data())
async def test_only_the_right_sequence_completes(data: st.DataObject) -> None:
    """Frames lost, repeated, reordered or taken from another attachment never complete a fetch."""
    source, target = make_pool(16, [1, 0], seed=1), make_pool(16, [0, 1], seed=2)
    where = KVRange(0, NUM_LAYERS, 0, 24)
    frames = []
    for epoch in (EPOCH, EPOCH + 1):
        writer = FrameWriter(epoch)
        for start in (0, 8, 16):
            part = replace(where, token_start=start, token_stop=start + 8)
            frames.append(data_frame(writer, source, part))
        frames.append(b"".join(writer.end(where, b"")))
    sent = data.draw(st.one_of(st.permutations(range(4)), st.lists(st.integers(0, 7), max_size=6)))
    importer = open_importer(target, where)
    for position, index in enumerate(sent):
        if index != position:
            expected = Cause.FRAME_ORDER if index < 4 else Cause.EPOCH_MISMATCH
            assert await refused(importer, frames[index]) is expected
            break
        if await importer.frame(frames[index]):
            break
    assert importer.is_complete == (list(sent[:4]) == [0, 1, 2, 3])
    if importer.valid_tokens:
        valid = replace(where, token_stop=importer.valid_tokens)
        assert target.content(valid) == source.content(valid)
    source.memory.close()
    target.memory.close()


async def test_patience_follows_bytes_and_rate(source: Pool, target: Pool) -> None:
    now = [100.0]
    importer = Importer(
        target.memory, target.block_ids, ALL, rate_bytes_s=TOKEN_BYTES, clock=lambda: now[0]
    )
    importer.opened(EPOCH, num_ready_tokens=48)
    assert importer.patience_s() == pytest.approx(2 + 4 * 32)  # 32 tokens at 1 token per second
    writer = FrameWriter(EPOCH)
    now[0] += 4
    await importer.frame(data_frame(writer, source, replace(ALL, token_stop=32)))
    # 16 tokens in 4 s measured: faster than assumed
    assert importer.patience_s() == pytest.approx(2 + 4 * 16 / 4, rel=0.05)
    await importer.frame(data_frame(writer, source, replace(ALL, token_start=32, token_stop=48)))
    assert importer.patience_s() is None  # the rest is still being computed


async def test_what_was_ready_at_opening_is_timed(source: Pool, target: Pool) -> None:
    now = [10.0]
    importer = Importer(target.memory, target.block_ids, ALL, clock=lambda: now[0])
    importer.opened(EPOCH, 32)
    writer = FrameWriter(EPOCH)
    frames = [data_frame(writer, source, KVRange(0, NUM_LAYERS, t, t + 16)) for t in (16, 32, 48)]
    seen = []
    for frame in frames:
        now[0] += 0.5
        await importer.frame(frame)
        seen.append((importer.ready_bytes, importer.ready_ms))
    assert seen == [(len(frames[0]), 500.0)] * 3


async def test_nothing_is_timed_if_all_has_yet_to_be_computed(source: Pool, target: Pool) -> None:
    importer = Importer(target.memory, target.block_ids, ALL)
    importer.opened(EPOCH, 0)
    await importer.frame(data_frame(FrameWriter(EPOCH), source, ALL))
    assert (importer.valid_tokens, importer.ready_bytes) == (64, 0)
