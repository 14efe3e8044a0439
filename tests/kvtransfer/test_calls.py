"""`KV.Fetch` against peers that do not keep to the protocol, and its messages' bytes."""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Buffers
from baton.kvtransfer.calls import FetchCall, _CallConsumer, _Replies
from baton.kvtransfer.fetch_wire import (
    FrameMessages,
    decode_reply,
    encode_reply,
    fetch_open_from_pb,
    fetch_open_to_pb,
)
from baton.kvtransfer.pump import Credits
from baton.v1 import kv_pb2 as pb
from tests.kvtransfer.support import (
    ScriptedAttachment,
    ScriptedSource,
    frames_script,
    grpc_end,
    make_fetch,
)


@given(st.binary(max_size=400), st.integers(0, 64))
def test_a_frame_crosses_as_the_message_that_the_proto_says(frame: bytes, cut: int) -> None:
    data = encode_reply(FrameMessages().take((frame[:cut], memoryview(frame)[cut:])))
    assert data == pb.FetchReply(frame=frame).SerializeToString()
    decoded = decode_reply(data)
    assert isinstance(decoded, memoryview)
    assert decoded == frame


@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, 1 << 21, (1 << 21) - 1])
def test_frame_lengths_around_varint_borders(size: int) -> None:
    messages = FrameMessages()
    buffer = messages.buffer(size)
    buffer[:] = bytes([7]) * size
    data = encode_reply(messages.take((buffer,)))
    assert data == pb.FetchReply(frame=bytes([7]) * size).SerializeToString()
    assert bytes(decode_reply(data)) == bytes([7]) * size  # type: ignore[arg-type]


def test_frames_put_together_side_by_side_are_not_mistaken_for_each_other() -> None:
    messages = FrameMessages()
    buffers = [messages.buffer(3) for _ in range(4)]
    for index, buffer in enumerate(buffers):
        buffer[:] = bytes([index]) * 3
    taken = [messages.take((buffer,)) for buffer in reversed(buffers)]
    assert [data[-3:] for data in taken] == [bytes([index]) * 3 for index in (3, 2, 1, 0)]
    del taken
    gc.collect()
    assert buffers[2] == b"\2\2\2", "it keeps the memory"
    assert messages.take((buffers[0],))[-3:] == bytes(3), "once taken it is like any other frame"


async def test_frames_beside_a_call_do_not_wait_for_its_answer_to_leave() -> None:
    """The answer's write never ends: whoever waited for it would send nothing."""
    lane = QueueLane()
    consumer = _CallConsumer(StuckCall(), _Replies(StuckCall()), Credits(2), lane, False)
    async with asyncio.timeout(5):
        await consumer.opened(1, 0)
        await consumer.send((b"frame",))
    assert lane.sent == [(b"frame",)]


def test_other_spellings_of_a_frame_are_understood() -> None:
    # An over-long varint and an unknown field behind it: valid protobuf, not our own bytes.
    assert bytes(decode_reply(b"\x1a\x83\x00abc")) == b"abc"  # type: ignore[arg-type]
    assert bytes(decode_reply(b"\x1a\x03abc\x78\x01")) == b"abc"  # type: ignore[arg-type]
    reply = pb.FetchReply(opened=pb.FetchOpened(epoch=5))
    assert decode_reply(encode_reply(reply)) == reply


@given(st.binary(max_size=40))
def test_noise_is_a_message_or_an_error_of_protobuf(noise: bytes) -> None:
    with suppress(DecodeError):
        decode_reply(b"\x1a" + noise)


def test_opening_survives_the_wire() -> None:
    fetch = make_fetch(50, token_start=16, initial_credit=3)
    message = pb.FetchOpen.FromString(fetch_open_to_pb(fetch, "ucx", b"lane").SerializeToString())
    assert fetch_open_from_pb(message) == (fetch, "ucx", b"lane")


def opening() -> pb.FetchOpen:
    return fetch_open_to_pb(make_fetch(1), "grpc", b"")


def spoiled(**fields: Any) -> pb.FetchOpen:
    message = opening()
    for name, value in fields.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (pb.FetchOpen(), Cause.UNSUPPORTED),
        (pb.FetchOpen(chain=pb.HashChain(hashes=[bytes(32)])), Cause.PROTOCOL),
        (pb.FetchOpen(chain=pb.HashChain(hashes=[bytes(31)])), Cause.PROTOCOL),
        (spoiled(fingerprint=b"short"), Cause.PROTOCOL),
        (spoiled(tokens_digest=b""), Cause.PROTOCOL),
        (spoiled(salt_digest=bytes(33)), Cause.PROTOCOL),
        (spoiled(consumer=""), Cause.PROTOCOL),
        (spoiled(consumer="x" * 1000), Cause.PROTOCOL),
        (spoiled(transport=""), Cause.PROTOCOL),
        (spoiled(lane=bytes(1 << 20)), Cause.PROTOCOL),
    ],
)
def test_what_no_correct_consumer_opens(message: pb.FetchOpen, cause: Cause) -> None:
    with pytest.raises(BatonError) as caught:
        fetch_open_from_pb(message)
    assert caught.value.cause is cause


async def endless(_attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
    while True:
        yield (b"frame",)


class StuckCall:
    """gRPC's end of a call whose consumer reads nothing."""

    async def write(self, _reply: Any) -> None:
        await asyncio.Event().wait()


class QueueLane:
    device = None

    def __init__(self) -> None:
        self.sent: list[Buffers] = []

    def buffer(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    async def send(self, frame: Buffers) -> None:
        self.sent.append(frame)

    async def close(self, is_complete: bool) -> None: ...


class RawCall:
    """A consumer that says whatever a test wants."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        method = channel.stream_stream("/baton.v1.KV/Fetch")
        self.call: Any = method(metadata=(("authorization", "Bearer secret"),))

    async def send(self, message: Any) -> None:
        await self.call.write(
            message if isinstance(message, bytes) else message.SerializeToString()
        )

    async def cause(self) -> Cause:
        """Of the failure that ends the call; frames before it are skipped."""
        while (data := await self.call.read()) is not grpc.aio.EOF:
            reply = decode_reply(data)
            if isinstance(reply, pb.FetchReply) and reply.WhichOneof("message") == "failed":
                return Cause(reply.failed.cause)
        raise AssertionError("the call ended in silence")


@pytest.fixture
async def source() -> ScriptedSource:
    return ScriptedSource(endless)


@pytest.fixture
async def raw(source: ScriptedSource) -> AsyncIterator[RawCall]:
    async with grpc_end("grpc") as transport:
        address = (await transport.start(source)).address
        async with grpc.aio.insecure_channel(address) as channel:
            yield RawCall(channel)


@pytest.mark.parametrize(
    "first",
    [
        pb.FetchRequest(),
        pb.FetchRequest(credit=pb.FetchCredit(num_frames=1)),
        pb.FetchRequest(done=pb.FetchDone()),
    ],
)
async def test_a_fetch_begins_with_opening(raw: RawCall, first: pb.FetchRequest) -> None:
    await raw.send(first)
    assert await raw.cause() is Cause.PROTOCOL


async def test_a_transport_that_is_not_offered(raw: RawCall) -> None:
    await raw.send(pb.FetchRequest(open=spoiled(transport="pigeon")))
    assert await raw.cause() is Cause.UNSUPPORTED


@pytest.mark.parametrize(
    "second",
    [
        pb.FetchRequest(open=opening()),
        pb.FetchRequest(credit=pb.FetchCredit(num_frames=0)),
        pb.FetchRequest(credit=pb.FetchCredit(num_frames=1 << 30)),
        pb.FetchRequest(),
    ],
)
async def test_nonsense_in_the_middle_ends_the_attachment(
    raw: RawCall, source: ScriptedSource, second: pb.FetchRequest
) -> None:
    await raw.send(pb.FetchRequest(open=opening()))
    await raw.send(second)
    assert await raw.cause() is Cause.PROTOCOL
    await source.attachments[0].closed.wait()
    assert not source.attachments[0].is_done


async def test_bytes_that_are_no_message(raw: RawCall, source: ScriptedSource) -> None:
    await raw.call.write(b"\xff\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError):
        await raw.cause()
    assert source.attachments == []


async def test_a_consumer_that_hangs_up_is_not_done(raw: RawCall, source: ScriptedSource) -> None:
    await raw.send(pb.FetchRequest(open=opening()))
    attachment = await source.attachment()
    await raw.call.done_writing()
    await attachment.closed.wait()
    assert not attachment.is_done


async def test_a_consumer_that_drops_the_call_is_not_done(
    raw: RawCall, source: ScriptedSource
) -> None:
    await raw.send(pb.FetchRequest(open=opening()))
    attachment = await source.attachment()
    raw.call.cancel()
    await attachment.closed.wait()
    assert not attachment.is_done


async def test_without_the_token_nothing_is_opened(source: ScriptedSource) -> None:
    async with grpc_end("grpc") as transport:
        address = (await transport.start(source)).address
        async with grpc.aio.insecure_channel(address) as channel:
            call: Any = channel.stream_stream("/baton.v1.KV/Fetch")()
            with suppress(grpc.aio.AioRpcError):  # refused already
                await call.write(pb.FetchRequest(open=opening()).SerializeToString())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert source.attachments == []


async def test_done_before_the_frames_are_taken_ends_the_fetch(
    raw: RawCall, source: ScriptedSource
) -> None:
    source.script = frames_script([b"x"] * 3)
    await raw.send(pb.FetchRequest(open=opening()))
    await raw.send(pb.FetchRequest(done=pb.FetchDone()))
    attachment = await source.attachment()
    await asyncio.wait_for(attachment.closed.wait(), 20)
    assert attachment.is_done


class ScriptedCall:
    """gRPC's end of a call that answers with these replies, then ends."""

    def __init__(self, *replies: Any) -> None:
        self._replies = [*replies, grpc.aio.EOF]

    async def write(self, _request: Any) -> None: ...

    async def read(self) -> Any:
        await asyncio.sleep(0)
        return self._replies.pop(0)


OPENED = pb.FetchReply(opened=pb.FetchOpened(epoch=5, num_ready_tokens=7))


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    ("replies", "cause"),
    [
        ((), Cause.TRANSPORT_FAILED),
        ((memoryview(b"a frame"),), Cause.PROTOCOL),
        ((OPENED,), Cause.PROTOCOL),
        ((pb.FetchReply(failed=pb.FetchFailed(cause=46)),), Cause.LEASE_UNKNOWN),
    ],
)
async def test_who_watches_a_call_beside_frames_hears_why_it_ended(
    replies: tuple[Any, ...], cause: Cause, is_late: bool
) -> None:
    """Also if that came before anybody watched."""
    told: list[BatonError] = []
    call = FetchCall(ScriptedCall(OPENED, *replies), opening())
    assert await call.answer() == (5, 7)
    if is_late:
        await asyncio.wait({call.reading})
    call.watch(told.append)
    await asyncio.wait({call.reading})
    assert told[0].cause is cause


async def test_who_has_everything_is_told_nothing() -> None:
    told: list[BatonError] = []
    call = FetchCall(ScriptedCall(OPENED), opening())
    await call.answer()
    call.watch(told.append)
    call.watch(None)
    await asyncio.wait({call.reading})
    assert not told


async def test_more_frames_than_there_is_credit_for_end_the_call() -> None:
    asked = opening()
    frames = [memoryview(b"frame")] * (asked.initial_credit + 1)
    call = FetchCall(ScriptedCall(OPENED, *frames), asked)
    await call.answer()
    await asyncio.wait({call.reading})
    assert len(await call.frames(100)) == asked.initial_credit
    with pytest.raises(BatonError) as caught:
        await call.frames(1)
    assert caught.value.cause is Cause.PROTOCOL
