"""The frame codec: vectors, round trips, and every kind of damage."""

import random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BatonError, Cause
from baton.kvtransfer.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    FrameKind,
    FrameReader,
    FrameWriter,
    decode,
    encode,
    seal,
)
from baton.types import KVRange

WHERE = KVRange(0, 24, 16, 32)

# The format is a contract between versions: these bytes may never change.
VECTORS = [
    (
        FrameKind.DATA,
        0x1122334455667788,
        3,
        KVRange(1, 2, 16, 17, 4, 6),
        bytes(range(8)),
        "424b560101004000080000000300000088776655443322110100000002000000"
        "1000000011000000040000000600000000000000000000001ae8eb2a4d5d9a3a"
        "0001020304050607",
    ),
    (
        FrameKind.END,
        1,
        0,
        KVRange(0, 24, 64, 64),
        b"",
        "424b560102004000000000000000000001000000000000000000000018000000"
        "400000004000000000000000000000000000000000000000c07785276ad3d290",
    ),
]


def joined(kind: FrameKind, epoch: int, seq: int, where: KVRange, payload: bytes) -> bytes:
    return b"".join(encode(kind, epoch, seq, where, memoryview(payload)))


def cause_of(data: bytes, reader: FrameReader | None = None) -> Cause:
    with pytest.raises(BatonError) as caught:
        decode(data) if reader is None else reader.accept(data)
    return caught.value.cause


@pytest.mark.parametrize(("kind", "epoch", "seq", "where", "payload", "expected"), VECTORS)
def test_vectors(
    kind: FrameKind, epoch: int, seq: int, where: KVRange, payload: bytes, expected: str
) -> None:
    data = joined(kind, epoch, seq, where, payload)
    assert data.hex() == expected
    checksum = xxhash.xxh3_64_intdigest(data[:56] + payload)
    assert data[56:64] == checksum.to_bytes(8, "little")
    frame = decode(data)
    assert (frame.kind, frame.epoch, frame.seq, frame.range) == (kind, epoch, seq, where)
    assert bytes(frame.payload) == payload


def test_the_payload_is_neither_copied_in_nor_out() -> None:
    payload = memoryview(bytearray(b"before"))
    parts = encode(FrameKind.DATA, 1, 0, WHERE, payload)
    assert parts[1] is payload
    data = bytearray(HEADER_BYTES) + payload
    (whole,) = seal(memoryview(data), FrameKind.DATA, 1, 0, WHERE)
    assert bytes(whole) == b"".join(parts) == bytes(data)
    frame = decode(memoryview(data))
    data[HEADER_BYTES:] = b"after!"
    assert bytes(frame.payload) == b"after!"


def ordered(low: int, width: int) -> st.SearchStrategy[tuple[int, int]]:
    starts = st.integers(0, 2**32 - 1 - width)
    return st.tuples(starts, st.integers(low, width)).map(lambda x: (x[0], x[0] + x[1]))


@st.composite
def ranges(draw: st.DrawFn, min_tokens: int = 1) -> KVRange:
    heads = draw(st.one_of(st.just((0, 0)), ordered(1, 100)))
    return KVRange(*draw(ordered(1, 500)), *draw(ordered(min_tokens, 10_000)), *heads)


@given(ranges(), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_round_trip(where: KVRange, epoch: int, seq: int, payload: bytes) -> None:
    for kind in FrameKind:
        frame = decode(joined(kind, epoch, seq, where, payload))
        assert (frame.kind, frame.epoch, frame.seq, frame.range) == (kind, epoch, seq, where)
        assert bytes(frame.payload) == payload


@given(ranges(min_tokens=0), st.binary(max_size=64))
def test_only_end_frames_may_cover_no_tokens(where: KVRange, payload: bytes) -> None:
    assert decode(joined(FrameKind.END, 1, 0, where, payload)).range == where
    data = joined(FrameKind.DATA, 1, 0, where, payload)
    if where.num_tokens:
        decode(data)
    else:
        assert cause_of(data) is Cause.FRAME_CORRUPT


@pytest.mark.parametrize("size", [0, 1, 7, 200, 1000])
def test_every_single_bit_flip_is_found(size: int) -> None:
    data = joined(FrameKind.DATA, 7, 2, WHERE, random.Random(size).randbytes(size))
    decode(data)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert cause_of(bytes(flipped)) in (Cause.FRAME_CORRUPT, Cause.FRAME_TRUNCATED)


@settings(max_examples=300)
@given(st.data())
def test_any_damage_is_found(data: st.DataObject) -> None:
    frame = joined(FrameKind.DATA, 7, 2, WHERE, bytes(range(100)))
    start = data.draw(st.integers(0, len(frame) - 1))
    stop = data.draw(st.integers(start, len(frame)))
    damaged = frame[:start] + data.draw(st.binary(max_size=64)) + frame[stop:]
    if damaged != frame:
        assert cause_of(damaged) in (Cause.FRAME_CORRUPT, Cause.FRAME_TRUNCATED)


@given(st.binary(max_size=200))
def test_noise_is_never_a_frame(noise: bytes) -> None:
    assert cause_of(noise) in (Cause.FRAME_CORRUPT, Cause.FRAME_TRUNCATED)


def test_every_truncation_is_found() -> None:
    frame = joined(FrameKind.DATA, 7, 2, WHERE, bytes(50))
    for length in range(len(frame)):
        assert cause_of(frame[:length]) is Cause.FRAME_TRUNCATED
    assert cause_of(frame + b"\0") is Cause.FRAME_CORRUPT


def test_an_announced_length_beyond_the_limit_is_refused_before_it_is_believed() -> None:
    frame = bytearray(joined(FrameKind.DATA, 7, 2, WHERE, bytes(50)))
    frame[8:12] = (MAX_FRAME_BYTES - HEADER_BYTES + 1).to_bytes(4, "little")
    assert cause_of(bytes(frame)) is Cause.FRAME_CORRUPT
    frame[8:12] = (MAX_FRAME_BYTES - HEADER_BYTES).to_bytes(4, "little")
    assert cause_of(bytes(frame)) is Cause.FRAME_TRUNCATED


def numbered(epoch: int, num_frames: int) -> list[bytes]:
    writer = FrameWriter(epoch)
    frames = [
        writer.data(KVRange(0, 1, i, i + 1), memoryview(bytearray(HEADER_BYTES) + bytes([i])))
        for i in range(num_frames)
    ]
    return [b"".join(frame) for frame in (*frames, writer.end(WHERE, b"end"))]


def test_a_reader_takes_what_a_writer_numbers() -> None:
    reader = FrameReader(5)
    frames = [reader.accept(data) for data in numbered(5, 4)]
    assert [frame.seq for frame in frames] == [0, 1, 2, 3, 4]
    assert [frame.kind for frame in frames] == [FrameKind.DATA] * 4 + [FrameKind.END]


@given(st.data())
def test_lost_repeated_and_reordered_frames_are_found(data: st.DataObject) -> None:
    frames = numbered(5, 5)
    sent = data.draw(st.lists(st.integers(0, 5), max_size=8))
    reader = FrameReader(5)
    for position, index in enumerate(sent):
        if index != position:
            assert cause_of(frames[index], reader) is Cause.FRAME_ORDER
            return
        assert reader.accept(frames[index]).seq == index


def test_a_replay_from_another_attachment_is_found() -> None:
    reader = FrameReader(6)
    reader.accept(numbered(6, 2)[0])
    assert cause_of(numbered(5, 2)[1], reader) is Cause.EPOCH_MISMATCH
    reader.accept(numbered(6, 2)[1])  # what was refused has changed nothing
