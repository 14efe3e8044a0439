"""What a UCX transport does not believe: lanes that were damaged, messages beyond the credit."""

import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer.memory import heap_buffer

ucx = pytest.importorskip("baton.kvtransfer.ucx", exc_type=ImportError)
messages = pytest.importorskip("baton.kvtransfer.ucx_messages", exc_type=ImportError)


def test_a_damaged_lane_never_reaches_ucx() -> None:
    lane = ucx.lane_to_bytes(1 << 63 | 5, 1000, b"address")
    assert ucx.lane_from_bytes(lane) == (1 << 63 | 5, 1000, b"address")
    damaged = [bytes((*lane[:at], lane[at] ^ 1, *lane[at + 1 :])) for at in range(len(lane))]
    for wrong in (*damaged, lane[:-1], lane + b"x", b""):
        with pytest.raises(BatonError) as caught:
            ucx.lane_from_bytes(wrong)
        assert caught.value.cause is Cause.PROTOCOL


async def test_more_messages_than_were_allowed() -> None:
    inbox = messages.Inbox(5, 100, 1, heap_buffer)
    inbox.allow(1)
    for _ in range(2):
        assert len(inbox.room_for(10)) == 10
    assert inbox._arrivals.error is None
    inbox.room_for(10)
    with pytest.raises(BatonError) as caught:
        await inbox.take(1)
    assert caught.value.cause is Cause.PROTOCOL


async def test_a_message_that_is_too_large_gets_no_memory() -> None:
    inbox = messages.Inbox(5, 100, 2, heap_buffer)
    assert len(inbox.room_for(100)) == 100
    assert len(inbox.room_for(101)) == 0
    with pytest.raises(BatonError) as caught:
        await inbox.take(1)
    assert caught.value.cause is Cause.PROTOCOL
