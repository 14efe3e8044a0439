"""What `KV.Fetch` says, as bytes: frames as replies without a copy in between, and the opening."""

import ctypes

from baton import wire
from baton.errors import BatonError, Cause
from baton.grants import HashChain
from baton.kvtransfer.base import Buffers, FetchOpen, Probe
from baton.types import KVTicket
from baton.v1 import kv_pb2 as pb
from baton.wire_prefix import chain_from_pb, chain_to_pb

MAX_LANE_BYTES = 64 << 10
_FRAME_TAG = 0x1A  # FetchReply.frame: field 3, length-delimited

# Of Python's C API; made once, because each is a class of its own.
_NEW_BYTES = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_ADDRESS_OF_BYTES = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(
    ("PyBytes_AsString", ctypes.pythonapi)
)


def encode_reply(reply: pb.FetchReply | bytes) -> bytes:
    """A FetchReply's bytes; a frame has them already, from `FrameMessages`."""
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


class FrameMessages:
    """Frames as FetchReplies. gRPC takes nothing but `bytes`, so a frame is put together inside of
    those that its message will be: behind a tag and a length."""

    def __init__(self) -> None:
        # Messages by the identity of their frame's buffer, which is kept so that it stays the
        # only one.
        self._staged: dict[int, tuple[bytes, memoryview]] = {}

    def buffer(self, num_bytes: int) -> memoryview:
        """See `base.Staging.buffer`."""
        prefix = _frame_prefix(num_bytes)
        message, memory = _unwritten_bytes(len(prefix) + num_bytes)
        memory[: len(prefix)] = prefix
        frame = memory[len(prefix) :]
        self._staged[id(frame)] = message, frame
        return frame

    def take(self, frame: Buffers) -> bytes:
        """The message of a frame; one that was not put together here is copied."""
        staged = self._staged.pop(id(frame[0]), None)
        if staged is not None:
            return staged[0]
        return b"".join((_frame_prefix(sum(len(part) for part in frame)), *frame))


def _frame_prefix(num_bytes: int) -> bytes:
    prefix = bytearray((_FRAME_TAG,))
    while num_bytes > 0x7F:
        prefix.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    prefix.append(num_bytes)
    return bytes(prefix)


def _unwritten_bytes(num_bytes: int) -> tuple[bytes, memoryview]:
    """New `bytes` of undefined content, and their memory, which may be written until somebody else
    sees them: the one case in which Python's C API allows that. The memory keeps the bytes."""
    message: bytes = _NEW_BYTES(None, num_bytes)
    memory = (ctypes.c_ubyte * num_bytes).from_address(_ADDRESS_OF_BYTES(message))
    memory.keeps = message  # type: ignore[attr-defined]
    return message, memoryview(memory).cast("B")


def decode_reply(data: bytes) -> pb.FetchReply | memoryview:
    """The message, or a view of the frame in it."""
    if data[:1] == bytes((_FRAME_TAG,)):
        length, at = 0, 1
        while at < min(len(data), 6):
            length |= (data[at] & 0x7F) << (7 * (at - 1))
            at += 1
            if data[at - 1] <= 0x7F:
                break
        if at + length == len(data):
            return memoryview(data)[at:]
    reply = pb.FetchReply.FromString(data)
    return memoryview(reply.frame) if reply.WhichOneof("message") == "frame" else reply


def fetch_open_to_pb(fetch: FetchOpen, transport: str, lane: bytes) -> pb.FetchOpen:
    message = pb.FetchOpen(
        range=wire.range_to_pb(fetch.range),
        layout=wire.layout_to_pb(fetch.layout),
        fingerprint=fetch.fingerprint,
        tokens_digest=fetch.tokens_digest,
        salt_digest=fetch.salt_digest,
        transport=transport,
        consumer=fetch.consumer,
        initial_credit=fetch.initial_credit,
        lane=lane,
        traceparent=fetch.traceparent,
        pace_ms=fetch.pace_ms,
    )
    if isinstance(fetch.source, Probe):
        message.probe_bytes = fetch.source.num_bytes
    elif isinstance(fetch.source, HashChain):
        message.chain.CopyFrom(chain_to_pb(fetch.source))
        message.consumer_incarnation = fetch.source.consumer_incarnation
    else:
        message.ticket.CopyFrom(wire.ticket_to_pb(fetch.source))
    return message


def fetch_open_from_pb(message: pb.FetchOpen) -> tuple[FetchOpen, str, bytes]:
    """(fetch, transport, lane).

    Raises:
        BatonError: PROTOCOL; UNSUPPORTED for a source of a later version.
    """
    wire.check_len(message.lane, MAX_LANE_BYTES, "lane")
    wire.check_len(message.traceparent, wire.MAX_TRACEPARENT_LEN, "traceparent")
    fetch = FetchOpen(
        source=_source_from_pb(message),
        range=wire.range_from_pb(message.range),
        layout=wire.layout_from_pb(message.layout),
        fingerprint=wire.exactly(message.fingerprint, wire.DIGEST_BYTES, "fingerprint"),
        tokens_digest=wire.exactly(message.tokens_digest, wire.DIGEST_BYTES, "tokens digest"),
        salt_digest=wire.exactly(message.salt_digest, wire.DIGEST_BYTES, "salt digest"),
        consumer=wire.text(message.consumer, wire.MAX_ID_LEN, "consumer"),
        initial_credit=message.initial_credit,
        traceparent=message.traceparent,
        pace_ms=message.pace_ms,
    )
    return fetch, wire.text(message.transport, wire.MAX_ID_LEN, "transport"), message.lane


def _source_from_pb(message: pb.FetchOpen) -> KVTicket | HashChain | Probe:
    match message.WhichOneof("source"):
        case "ticket":
            return wire.ticket_from_pb(message.ticket)
        case "chain":
            return chain_from_pb(message.chain, message.consumer_incarnation)
        case "probe_bytes":
            return Probe(message.probe_bytes)
        case _:
            raise BatonError(Cause.UNSUPPORTED, "a fetch needs a ticket or a chain of hashes")
