"""The transport over UCX: frames as tagged messages beside the `KV.Fetch` call.

The consumer names its UCX worker's address and a random tag when it opens the fetch (its *lane*);
the producer sends the frames there. Both travel in the authenticated call, so whoever does not hold
the cluster token can name no lane, and guesses no tag.

    lane    "BLU1", tag (u64), largest frame in bytes (u32), address of the consumer's UCX worker,
            all little-endian, then XXH3-64 of everything before

Needs the `ucx` extra; `baton.kvtransfer.negotiate` knows whether it is there.
"""

import asyncio
import secrets
import struct
import time
from collections import deque

import xxhash

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Buffers, FetchOpen, FrameSink, FrameSource
from baton.kvtransfer.calls import FetchCall, FetchCalls
from baton.kvtransfer.frames import MAX_FRAME_BYTES
from baton.kvtransfer.memory import heap_buffer
from baton.kvtransfer.pump import FetchScope, answer_in_time, settle, take_frames
from baton.kvtransfer.ucx_messages import Inbox
from baton.kvtransfer.ucx_worker import Endpoint, UcxWorker, settings_for
from baton.rpc import is_loopback
from baton.types import TransferStats, TransportAddress

_LANE = struct.Struct("<4sQI")
_CHECKSUM = struct.Struct("<Q")
_MAGIC = b"BLU1"
_MAX_IDLE_ENDPOINTS = 16
_FLUSH_S = 1.0  # for what is still on its way when a fetch is over


class UcxTransport:
    """A `Transport` whose frames are messages of one UCX worker per process."""

    name = "ucx"

    def __init__(self, calls: FetchCalls, address: str) -> None:
        """
        Args:
            calls: carries opening, credit, failure and cancellation.
            address: host:port at which others reach the server behind `calls`. On a loopback
                address UCX listens on the loopback device alone.
        """
        self._calls = calls
        self._address = address
        self._scope = FetchScope()
        self._worker = UcxWorker(settings_for(is_loopback(address.rpartition(":")[0])))
        self._idle: deque[tuple[bytes, Endpoint]] = deque()  # used last at the right

    async def start(self, source: FrameSource) -> TransportAddress:
        self._calls.offer(self.name, source, self._scope, self._open_lane)
        return TransportAddress(self.name, self._address)

    def reaches(self, peer: TransportAddress) -> bool:
        return True

    async def fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        return await self._scope.run(self._fetch(peer, fetch, sink))

    async def _fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        started_s = time.monotonic()
        tag = secrets.randbits(64)
        inbox = self._worker.open_inbox(tag, MAX_FRAME_BYTES, fetch.initial_credit)
        lane = lane_to_bytes(tag, MAX_FRAME_BYTES, self._worker.address)
        call = self._calls.call(peer.address, self.name, fetch, lane)
        watching: list[asyncio.Task[None]] = []

        async def give(num_frames: int) -> None:
            inbox.allow(num_frames)
            await call.give(num_frames)

        failure: BaseException | None = None
        try:
            sink.opened(*await answer_in_time(call.answer()))
            watching.append(asyncio.create_task(_watch(call, inbox)))
            received = await take_frames(inbox.take, sink, fetch.initial_credit, give)
        except BaseException as error:
            failure = error
            raise
        finally:
            self._worker.close_inbox(tag, is_drained=failure is None)
            try:
                if failure is not None:
                    await call.cancel(failure)
            finally:
                await settle(*watching)
        self._calls.finish(call)
        return TransferStats(
            self.name,
            received.num_bytes,
            received.num_frames,
            fetch.range.num_tokens,
            (time.monotonic() - started_s) * 1e3,
        )

    # ── producer's side ──────────────────────────────────────────────────────────────────────────

    async def _open_lane(self, lane: bytes) -> "_Lane":
        tag, max_frame_bytes, address = lane_from_bytes(lane)
        return _Lane(self, address, self._endpoint(address), tag, max_frame_bytes)

    def _endpoint(self, address: bytes) -> Endpoint:
        """An endpoint that nobody else uses: a fetch that is given up may have to close it."""
        for index, (idle_address, endpoint) in enumerate(self._idle):
            if idle_address == address and endpoint.is_usable:
                del self._idle[index]
                return endpoint
        return self._worker.connect(address)

    async def give_back(self, address: bytes, endpoint: Endpoint, is_complete: bool) -> None:
        """Keep an endpoint for the next fetch, unless something is stuck in it: what was sent may
        be in the kernel's buffers and arrive nowhere, so only a complete fetch speaks for it."""
        if not is_complete:
            endpoint.close()
            return
        try:
            async with asyncio.timeout(_FLUSH_S):
                await endpoint.sent()
            is_good = endpoint.is_usable
        except TimeoutError:
            is_good = False
        if is_good:
            self._idle.append((address, endpoint))
        else:
            endpoint.close()
        while len(self._idle) > _MAX_IDLE_ENDPOINTS:
            self._idle.popleft()[1].close()

    async def close(self) -> None:
        await self._scope.close()
        while self._idle:
            self._idle.popleft()[1].close()
        self._worker.close()


class _Lane:
    """The producer's end of one fetch; a `calls.Lane`."""

    def __init__(
        self,
        transport: UcxTransport,
        address: bytes,
        endpoint: Endpoint,
        tag: int,
        max_frame_bytes: int,
    ) -> None:
        self._transport = transport
        self._address = address
        self._endpoint = endpoint
        self._tag = tag
        self._max_frame_bytes = max_frame_bytes

    def buffer(self, num_bytes: int) -> memoryview:
        return heap_buffer(num_bytes)

    async def send(self, frame: Buffers) -> None:
        message = memoryview(frame[0] if len(frame) == 1 else b"".join(frame))
        if len(message) > self._max_frame_bytes:
            raise BatonError(Cause.UNSUPPORTED, f"the consumer takes no {len(message)} bytes")
        self._endpoint.send(message, self._tag)

    async def close(self, is_complete: bool) -> None:
        await self._transport.give_back(self._address, self._endpoint, is_complete)


async def _watch(call: FetchCall, inbox: Inbox) -> None:
    """The call's end is the end of the messages too."""
    inbox.fail(await call.failure())


def lane_to_bytes(tag: int, max_frame_bytes: int, address: bytes) -> bytes:
    body = _LANE.pack(_MAGIC, tag, max_frame_bytes) + address
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def lane_from_bytes(lane: bytes) -> tuple[int, int, bytes]:
    """(tag, largest frame, address of the consumer's UCX worker).

    Raises:
        BatonError: PROTOCOL; UCX itself must not be given an address that was damaged.
    """
    body, checksum = lane[: -_CHECKSUM.size], lane[-_CHECKSUM.size :]
    if (
        len(body) <= _LANE.size
        or not body.startswith(_MAGIC)
        or _CHECKSUM.unpack(checksum)[0] != xxhash.xxh3_64_intdigest(body)
    ):
        raise BatonError(Cause.PROTOCOL, "not a lane of this version")
    _, tag, max_frame_bytes = _LANE.unpack_from(body)
    return tag, max_frame_bytes, body[_LANE.size :]
