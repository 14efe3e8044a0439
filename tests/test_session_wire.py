"""The checksum on a session's messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import wire
from baton.errors import BatonError, Cause
from baton.messages import Heartbeat, StepBatch
from baton.session_wire import decoder, encode
from baton.types import LegId, Role, TokenChunk, WorkerSnapshot
from baton.v1 import worker_pb2

CHUNK = TokenChunk(LegId("r1", 1), 0, 3, (5, 70_000, 9))
BATCH = StepBatch((CHUNK,), WorkerSnapshot(Role.DECODE), heartbeat_seq=4)
DATA = encode(wire.worker_message_to_pb(BATCH))
decode_worker, decode_gateway = (
    decoder(worker_pb2.WorkerMessage),
    decoder(worker_pb2.GatewayMessage),
)


def test_round_trip_also_for_a_reader_that_knows_no_checksum() -> None:
    assert wire.worker_message_from_pb(decode_worker(DATA)) == BATCH
    message = worker_pb2.WorkerMessage.FromString(DATA)
    assert wire.worker_message_from_pb(message) == BATCH
    assert message.SerializeToString() == DATA, "the trailer is the field `checksum`"
    beat = decode_gateway(encode(wire.gateway_message_to_pb(Heartbeat(7))))
    assert wire.gateway_message_from_pb(beat) == Heartbeat(7)


def test_every_flipped_bit_is_refused() -> None:
    for position in range(len(DATA) * 8):
        damaged = bytearray(DATA)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(BatonError) as caught:
            wire.worker_message_from_pb(decode_worker(bytes(damaged)))
        assert caught.value.cause is Cause.PROTOCOL


@given(st.binary(max_size=200))
def test_noise_and_truncation_are_refused_and_never_raise(noise: bytes) -> None:
    for data in (noise, DATA[: len(noise)] if len(noise) < len(DATA) else DATA + b"\0"):
        assert decode_worker(data).WhichOneof("message") is None
    body = wire.worker_message_to_pb(BATCH).SerializeToString()
    assert decode_worker(body).WhichOneof("message") is None, "a checksum is required"
