"""The transports over UCX: frames as tagged messages beside the `KV.Fetch` call.

The consumer names its UCX worker's address and a random tag when it opens the fetch (its *lane*);
the producer sends the frames there. Both travel in the authenticated call, so whoever does not hold
the cluster token can name no lane, and guesses no tag.

    lane    "BLU1", tag (u64), largest frame in bytes (u32), address of the consumer's UCX worker,
            all little-endian, then XXH3-64 of everything before

Between pools in CUDA memory on one host (`cuda`), payloads never leave it: a data frame is a
message with its header, to the tag, and one with its payload out of device memory, to the tag with
its lowest bit inverted, which UCX moves from device to device (CUDA IPC).

Needs the `ucx` extra; `baton.kvtransfer.negotiate` knows whether it is there.
"""

import asyncio
import secrets
import struct
import time
from collections import deque

import xxhash

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import (
    DeviceFrame,
    DeviceMemory,
    FetchOpen,
    FrameSink,
    FrameSource,
    Incoming,
    Outgoing,
)
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.frames import MAX_FRAME_BYTES, is_payload_beside
from baton.kvtransfer.memory import heap_buffer
from baton.kvtransfer.pump import FetchScope, answer_in_time, take_frames
from baton.kvtransfer.shm_socket import boot_id
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

    def __init__(self, calls: FetchCalls, address: str, device: DeviceMemory | None = None) -> None:
        """
        Args:
            calls: carries opening, credit, failure and cancellation.
            address: host:port at which others reach the server behind `calls`. On a loopback
                address UCX listens on the loopback device alone.
            device: where payloads stay; None = they are in host memory.
        """
        self.name = "ucx" if device is None else "cuda"
        self._calls = calls
        self._address = address
        self._device = device
        self._scope = FetchScope()
        if device is not None:
            device.buffer(1)  # UCX looks for the CUDA context of the thread
        is_local = is_loopback(address.rpartition(":")[0])
        self._worker = UcxWorker(settings_for(is_local, on_device=device is not None))
        self._idle: deque[tuple[bytes, Endpoint]] = deque()  # used last at the right

    async def start(self, source: FrameSource) -> TransportAddress:
        self._calls.offer(self.name, source, self._scope, self._open_lane)
        where = self._address if self._device is None else f"{self._address}/{boot_id()}"
        return TransportAddress(self.name, where)

    def reaches(self, peer: TransportAddress) -> bool:
        """Device to device within a host alone: beyond, UCX would need hardware that few have."""
        return self._device is None or peer.address.partition("/")[2] == boot_id()

    async def fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        return await self._scope.run(self._fetch(peer, fetch, sink))

    async def _fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        started_s = time.monotonic()
        tag = secrets.randbits(64)
        mailbox = _Mailbox(self._worker, tag, fetch.initial_credit, self._device)
        lane = lane_to_bytes(tag, MAX_FRAME_BYTES, self._worker.address)
        call = self._calls.call(peer.address.partition("/")[0], self.name, fetch, lane)

        async def give(num_frames: int) -> None:
            mailbox.allow(num_frames)
            await call.give(num_frames)

        failure: BaseException | None = None
        try:
            sink.opened(*await answer_in_time(call.answer()))
            call.watch(mailbox.fail)  # its end is the end of the messages too
            received = await take_frames(mailbox.take, sink, fetch.initial_credit, give)
        except BaseException as error:
            failure = error
            raise
        finally:
            mailbox.close(is_drained=failure is None)
            call.watch(None)
            if failure is not None:
                await call.cancel(failure)
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
        endpoint = self._endpoint(address)
        return _Lane(self, address, endpoint, tag, max_frame_bytes, self._device)

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
        device: DeviceMemory | None,
    ) -> None:
        self.device = device
        self._transport = transport
        self._address = address
        self._endpoint = endpoint
        self._tag = tag
        self._max_frame_bytes = max_frame_bytes

    def buffer(self, num_bytes: int) -> memoryview:
        return heap_buffer(num_bytes)

    async def send(self, frame: Outgoing) -> None:
        if isinstance(frame, DeviceFrame):
            self._check(len(frame))
            self._endpoint.send(memoryview(frame.header), self._tag)
            self._endpoint.send(frame.payload, self._tag ^ 1)
        else:
            message = memoryview(frame[0] if len(frame) == 1 else b"".join(frame))
            self._check(len(message))
            self._endpoint.send(message, self._tag)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_frame_bytes:
            raise BatonError(Cause.UNSUPPORTED, f"the consumer takes no {num_bytes} bytes")

    async def close(self, is_complete: bool) -> None:
        await self._transport.give_back(self._address, self._endpoint, is_complete)


class _Mailbox:
    """The consumer's end of one fetch: whole frames, and headers with payloads beside them."""

    def __init__(
        self, worker: UcxWorker, tag: int, num_allowed: int, device: DeviceMemory | None
    ) -> None:
        self._worker = worker
        self._tag = tag
        self._inbox = worker.open_inbox(tag, MAX_FRAME_BYTES, num_allowed, heap_buffer)
        self._payloads = None
        if device is not None:
            self._payloads = worker.open_inbox(tag ^ 1, MAX_FRAME_BYTES, num_allowed, device.buffer)

    def allow(self, num_frames: int) -> None:
        self._inbox.allow(num_frames)
        if self._payloads is not None:
            self._payloads.allow(num_frames)

    def fail(self, error: BatonError) -> None:
        """Raised to whoever reads, after what has arrived."""
        self._inbox.fail(error)
        if self._payloads is not None:
            self._payloads.fail(error)

    async def take(self, max_frames: int) -> list[Incoming]:
        """The next ones, at least one.

        Raises:
            BatonError: see `fail`.
        """
        frames: list[Incoming] = []
        for message in await self._inbox.take(max_frames):
            if self._payloads is not None and is_payload_beside(message):
                (payload,) = await self._payloads.take(1)
                frames.append(DeviceFrame(message, payload))
            else:
                frames.append(message)
        return frames

    def close(self, is_drained: bool) -> None:
        """See `UcxWorker.close_inbox`."""
        self._worker.close_inbox(self._tag, is_drained)
        if self._payloads is not None:
            self._worker.close_inbox(self._tag ^ 1, is_drained)


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
