"""The frame: the one unit in which KV moves, the same on every transport.

A frame is a 64-byte header followed by its payload. All integers are little-endian.

    offset  size  field
    0       4     magic: "BKV" and the format version, 1
    4       1     kind: 1 = data, 2 = end
    5       1     payload: 0 = behind the header, 1 = beside it, in device memory
    6       2     header_bytes: 64
    8       4     payload_bytes
    12      4     seq: 0 for an attachment's first frame, then counting up by one
    16      8     epoch of the attachment; minted by the producer, never used twice
    24      4, 4  layer_start, layer_stop
    32      4, 4  token_start, token_stop
    40      4, 4  head_start, head_stop (0, 0 = all KV heads)
    48      8     zero
    56      8     checksum: XXH3-64 (seed 0) of header bytes 0..56 followed by the payload, or by
                  the 8 bytes of its digest (`baton.kernels.payload_digest`) if it is beside

A *data* frame carries the KV of its ranges in the order layer → token → (K, V) → head → dim, in the
layout's dtype, values after RoPE. Ranges are half-open and never empty. Within a layer an
attachment's frames cover ascending, adjacent token ranges.

The *end* frame is the last one. Its ranges are the whole fetch, which the consumer compares with
what it received (no tokens at all where the consumer had the whole prefix already); its payload is
an `EndOfKV` message (first tokens, digest of the prompt ids).

What a consumer does with a frame, in this order; the first failed check ends the fetch:

    shorter than its header, or than header_bytes + payload_bytes          FRAME_TRUNCATED
    unknown magic, kind or header_bytes; non-zero reserved bytes;
    longer than announced; larger than the agreed maximum                  FRAME_CORRUPT
    checksum differs                                                       FRAME_CORRUPT
    another epoch                                                          EPOCH_MISMATCH
    seq or ranges are not the next expected ones (gap, repeat, reorder)    FRAME_ORDER

Nothing in a header is trusted before the checksum was verified, except the lengths needed to find
the payload, and those only after the bounds above.
"""

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import xxhash

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Buffers, DeviceFrame, Incoming
from baton.types import KVRange

if TYPE_CHECKING:  # what is here needs no torch
    from torch import Tensor

HEADER_BYTES = 64
MAX_FRAME_BYTES = 16 << 20  # header and payload; a peer that announces more is refused

_MAGIC = b"BKV\x01"
_FIELDS = struct.Struct("<4sBBHIIQ6IQ")  # everything before the checksum
_KIND_OFFSET, _PLACE_OFFSET = 4, 5
_BEHIND, _BESIDE = 0, 1
_DIGEST = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_OFFSET = _FIELDS.size
_SMALL_BYTES = 16 << 10  # verified in a few microseconds

assert _CHECKSUM_OFFSET + _CHECKSUM.size == HEADER_BYTES


class FrameKind(IntEnum):
    DATA = 1
    END = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """A verified frame. `payload` is a view into the received bytes, or what lay beside them."""

    kind: FrameKind
    epoch: int
    seq: int
    range: KVRange
    payload: "memoryview | Tensor"


def encode(kind: FrameKind, epoch: int, seq: int, where: KVRange, payload: memoryview) -> Buffers:
    """The frame as (header, payload); the payload is not copied."""
    header = bytearray(HEADER_BYTES)
    _write_header(header, kind, _BEHIND, epoch, seq, where, len(payload), payload)
    return (header, payload)


def seal(frame: memoryview, kind: FrameKind, epoch: int, seq: int, where: KVRange) -> Buffers:
    """The frame in one piece: its header is written in front of the payload, which begins at
    HEADER_BYTES of `frame` already."""
    payload = frame[HEADER_BYTES:]
    _write_header(frame, kind, _BEHIND, epoch, seq, where, len(payload), payload)
    return (frame,)


def encode_beside(
    epoch: int, seq: int, where: KVRange, payload: "Tensor", digest: int
) -> DeviceFrame:
    """A data frame.

    Args:
        payload: [num_bytes] uint8, in device memory.
        digest: of `payload`.
    """
    header, digested = bytearray(HEADER_BYTES), memoryview(_DIGEST.pack(digest))
    _write_header(header, FrameKind.DATA, _BESIDE, epoch, seq, where, len(payload), digested)
    return DeviceFrame(memoryview(header), payload)


def unsealed(payload: "Tensor") -> DeviceFrame:
    """A frame that says where its payload is and nothing else: for whoever counts bytes."""
    header = bytearray(HEADER_BYTES)
    header[_PLACE_OFFSET] = _BESIDE
    return DeviceFrame(memoryview(header), payload)


def is_payload_beside(data: memoryview) -> bool:
    """Does it say of itself, unverified, that it is a header whose payload comes beside it?"""
    return len(data) == HEADER_BYTES and data[_PLACE_OFFSET] == _BESIDE


def _write_header(
    out: bytearray | memoryview,
    kind: FrameKind,
    place: int,
    epoch: int,
    seq: int,
    where: KVRange,
    payload_bytes: int,
    checked: memoryview,
) -> None:
    """`checked`: what the checksum covers behind the header's fields."""
    _FIELDS.pack_into(
        out,
        0,
        _MAGIC,
        kind,
        place,
        HEADER_BYTES,
        payload_bytes,
        seq,
        epoch,
        where.layer_start,
        where.layer_stop,
        where.token_start,
        where.token_stop,
        where.head_start,
        where.head_stop,
        0,
    )
    checksum = _checksum(memoryview(out)[:_CHECKSUM_OFFSET], checked)
    _CHECKSUM.pack_into(out, _CHECKSUM_OFFSET, checksum)


def decode(data: bytes | memoryview, max_frame_bytes: int = MAX_FRAME_BYTES) -> Frame:
    """Verify one frame's bytes.

    Raises:
        BatonError: FRAME_TRUNCATED, FRAME_CORRUPT.
    """
    view = memoryview(data)
    payload = view[HEADER_BYTES:]
    return _decode(view[:HEADER_BYTES], _BEHIND, payload, payload, max_frame_bytes)


def decode_beside(frame: DeviceFrame, digest: int, max_frame_bytes: int = MAX_FRAME_BYTES) -> Frame:
    """Verify a frame whose payload has this digest.

    Raises:
        BatonError: FRAME_TRUNCATED, FRAME_CORRUPT.
    """
    digested = memoryview(_DIGEST.pack(digest))
    decoded = _decode(memoryview(frame.header), _BESIDE, frame.payload, digested, max_frame_bytes)
    if decoded.kind is not FrameKind.DATA:
        raise BatonError(Cause.FRAME_CORRUPT, "an end beside its header")
    return decoded


def _decode(
    header: memoryview,
    place: int,
    payload: "memoryview | Tensor",
    checked: memoryview,
    max_frame_bytes: int,
) -> Frame:
    if len(header) < HEADER_BYTES:
        raise BatonError(Cause.FRAME_TRUNCATED, f"{len(header)} bytes are less than a header")
    fields = header[:_CHECKSUM_OFFSET]
    magic, kind, says_place, header_bytes, payload_bytes, seq, epoch, *ranges, reserved = (
        _FIELDS.unpack(fields)
    )
    if magic != _MAGIC or header_bytes != HEADER_BYTES or says_place != place or reserved:
        raise BatonError(Cause.FRAME_CORRUPT, "not a frame of this version")
    num_bytes = HEADER_BYTES + payload_bytes
    if num_bytes > max_frame_bytes:
        raise BatonError(
            Cause.FRAME_CORRUPT, f"frame of {num_bytes} bytes exceeds {max_frame_bytes}"
        )
    if len(payload) < payload_bytes:
        raise BatonError(Cause.FRAME_TRUNCATED, f"{len(payload)} of {payload_bytes} bytes")
    if len(payload) > payload_bytes:
        raise BatonError(Cause.FRAME_CORRUPT, f"{len(payload) - payload_bytes} bytes too many")
    (expected,) = _CHECKSUM.unpack_from(header, _CHECKSUM_OFFSET)
    if _checksum(fields, checked) != expected:
        raise BatonError(Cause.FRAME_CORRUPT, "checksum differs")
    where = KVRange(*ranges)
    if kind not in (FrameKind.DATA, FrameKind.END) or not _is_sane(where, kind):
        raise BatonError(Cause.FRAME_CORRUPT, f"kind {kind} with ranges {where}")
    return Frame(FrameKind(kind), epoch, seq, where, payload)


def is_small_end(data: Incoming) -> bool:
    """Does it say of itself, unverified, that it is an end frame, and takes no time to verify?"""
    if isinstance(data, DeviceFrame):
        return False
    return HEADER_BYTES <= len(data) <= _SMALL_BYTES and data[_KIND_OFFSET] == FrameKind.END


def covered(where: KVRange, num_tokens: int) -> KVRange:
    """What a fetch by hash moves of `where` when the producer has `num_tokens`: perhaps nothing."""
    stop = max(where.token_start, min(where.token_stop, num_tokens))
    return replace(where, token_stop=stop)


class FrameWriter:
    """Numbers the frames of one attachment. Its frames must be sent in the order they were made."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._seq = 0

    def data(self, where: KVRange, frame: memoryview) -> Buffers:
        """`frame` holds the payload from HEADER_BYTES on; the header is written into it."""
        return seal(frame, FrameKind.DATA, self._epoch, self._next_seq(), where)

    def beside(self, where: KVRange, payload: "Tensor", digest: int) -> DeviceFrame:
        """See `encode_beside`."""
        return encode_beside(self._epoch, self._next_seq(), where, payload, digest)

    def end(self, where: KVRange, payload: bytes) -> Buffers:
        return encode(FrameKind.END, self._epoch, self._next_seq(), where, memoryview(payload))

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq - 1


class FrameReader:
    """Accepts the frames of one attachment: right epoch, each sequence number once and in order."""

    def __init__(self, epoch: int, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._epoch = epoch
        self._max_frame_bytes = max_frame_bytes
        self._seq = 0

    def accept(self, data: Incoming, digest: int = 0) -> Frame:
        """
        Args:
            digest: of the payload, if it is beside.

        Raises:
            BatonError: FRAME_TRUNCATED, FRAME_CORRUPT, EPOCH_MISMATCH, FRAME_ORDER.
        """
        if isinstance(data, DeviceFrame):
            frame = decode_beside(data, digest, self._max_frame_bytes)
        else:
            frame = decode(data, self._max_frame_bytes)
        if frame.epoch != self._epoch:
            raise BatonError(
                Cause.EPOCH_MISMATCH, f"frame of epoch {frame.epoch}, expected {self._epoch}"
            )
        if frame.seq != self._seq:
            raise BatonError(Cause.FRAME_ORDER, f"frame {frame.seq}, expected {self._seq}")
        self._seq += 1
        return frame


def _checksum(fields: bytes | memoryview, payload: memoryview) -> int:
    digest = xxhash.xxh3_64(fields)
    digest.update(payload)
    return digest.intdigest()


def _is_sane(where: KVRange, kind: int) -> bool:
    heads_ok = where.head_start < where.head_stop or where.head_start == where.head_stop == 0
    min_tokens = 1 if kind == FrameKind.DATA else 0
    return where.num_layers > 0 and where.num_tokens >= min_tokens and heads_ok
