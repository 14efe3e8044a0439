"""A session's messages as bytes, with a checksum at the end, and both ends of the call.

    bytes    serialized message, then field 15 (fixed64): XXH3-64 (seed 0) of what is before it

Neither protobuf nor HTTP/2 notices a flipped bit in a token id, and TCP's 16 bits miss some. What
does not match is received as a message of no kind, which `baton.wire` refuses and which ends the
session: its requests go on elsewhere.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import xxhash
from google.protobuf.message import DecodeError, Message

from baton.rpc import Connection
from baton.v1 import worker_pb2 as pb

log = logging.getLogger(__name__)

SERVICE, METHOD = "baton.v1.Worker", "Session"
_CHECKSUM_TAG = b"\x79"  # field 15, fixed64
_TRAILER_BYTES = 9

M = TypeVar("M", pb.GatewayMessage, pb.WorkerMessage)


def encode(message: Message) -> bytes:
    body = message.SerializeToString()
    return body + _trailer(body)


def decoder(kind: type[M]) -> Callable[[bytes], M]:
    """Never raises: what cannot be read is a message of no kind."""

    def decode(data: bytes) -> M:
        body = data[:-_TRAILER_BYTES]
        try:
            if data[-_TRAILER_BYTES:] == _trailer(body):
                return kind.FromString(body)
            log.warning("a message of a session is damaged (%d bytes)", len(data))
        except DecodeError:
            log.warning("a message of a session is not what it should be (%d bytes)", len(data))
        return kind()

    return decode


def _trailer(body: bytes) -> bytes:
    return _CHECKSUM_TAG + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def open_session(connection: Connection) -> Any:
    """The gateway's end of a call: takes `pb.GatewayMessage`, gives `pb.WorkerMessage`."""
    method = connection.channel.stream_stream(
        f"/{SERVICE}/{METHOD}", encode, decoder(pb.WorkerMessage)
    )
    return method(metadata=connection.metadata)


def serve_sessions(server: grpc.aio.Server, behavior: Callable[[Any, Any], Any]) -> None:
    """Answer such calls with `behavior(requests, context)`."""
    handler = grpc.stream_stream_rpc_method_handler(behavior, decoder(pb.GatewayMessage), encode)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
    )
