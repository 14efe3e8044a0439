"""The transport between workers of one host: frames in shared memory beside the `KV.Fetch` call.

The producer packs into a ring that the consumer has mapped, so a frame is never copied on its way.
Opening, credit, failure and cancellation go over the call; a unix socket says which slots are
filled, and its end tells that a peer has died. Nothing has a name in shared memory, and nothing is
left of it when both processes are gone, however they ended.

    lane    "BLS1", number of slots (u16, little-endian), token of the connection (32 bytes)
"""

import secrets
import struct
import time
from collections import deque

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import FetchOpen, FrameSink, FrameSource
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.pump import MAX_CREDIT, FetchScope, answer_in_time, take_frames
from baton.kvtransfer.shm_inlet import Inlet
from baton.kvtransfer.shm_outlet import Listener, ShmLane
from baton.kvtransfer.shm_socket import TOKEN_BYTES, Place
from baton.types import TransferStats, TransportAddress

_LANE = struct.Struct(f"<4sH{TOKEN_BYTES}s")
_MAGIC = b"BLS1"
_MAX_IDLE = 8  # connections kept for the next fetch; each holds the pages of its credit's frames


class ShmTransport:
    """A `Transport` for workers that share a kernel, a file system and a user."""

    name = "shm"

    def __init__(self, calls: FetchCalls, address: str) -> None:
        """
        Args:
            calls: carries opening, credit, failure and cancellation.
            address: host:port at which others reach the server behind `calls`.

        Raises:
            OSError: there is no shared memory or no unix socket here.
        """
        self._calls = calls
        self._scope = FetchScope()
        self._listener = Listener()
        self._place = Place.of(address, self._listener.path)
        self._idle: deque[tuple[str, Inlet]] = deque()  # used last at the right

    async def start(self, source: FrameSource) -> TransportAddress:
        self._calls.offer(self.name, source, self._scope, self._open_lane)
        return TransportAddress(self.name, str(self._place))

    def reaches(self, peer: TransportAddress) -> bool:
        try:
            return Place.parse(peer.address).is_here()
        except BatonError:
            return False

    async def fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        return await self._scope.run(self._fetch(Place.parse(peer.address), fetch, sink))

    async def _fetch(self, peer: Place, fetch: FetchOpen, sink: FrameSink) -> TransferStats:
        started_s = time.monotonic()
        token = secrets.token_bytes(TOKEN_BYTES)
        inlet = self._connect(peer.path, token, fetch.initial_credit)
        lane = _LANE.pack(_MAGIC, fetch.initial_credit, token)
        call = self._calls.call(peer.host, self.name, fetch, lane)

        async def give(num_frames: int) -> None:
            inlet.allow(num_frames)
            await call.give(num_frames)

        try:
            sink.opened(*await answer_in_time(call.answer()))
            call.watch(inlet.fail)  # its end is the end of the frames too
            received = await take_frames(inlet.take, sink, fetch.initial_credit, give)
        except BaseException as error:
            inlet.close()
            await call.cancel(error)
            raise
        call.watch(None)
        self._keep(peer.path, inlet)
        self._calls.finish(call)
        return TransferStats(
            self.name,
            received.num_bytes,
            received.num_frames,
            fetch.range.num_tokens,
            (time.monotonic() - started_s) * 1e3,
        )

    def _connect(self, path: str, token: bytes, num_allowed: int) -> Inlet:
        """A connection that nobody else uses, with this fetch's token presented on it."""
        for index, (idle_path, inlet) in enumerate(self._idle):
            if idle_path == path and inlet.is_usable:
                del self._idle[index]
                break
        else:
            inlet = Inlet(path)
        try:
            inlet.open(token, num_allowed)
        except BatonError:
            inlet.close()
            raise
        return inlet

    def _keep(self, path: str, inlet: Inlet) -> None:
        if inlet.is_usable:
            self._idle.append((path, inlet))
        while self._idle and (len(self._idle) > _MAX_IDLE or not self._idle[0][1].is_usable):
            self._idle.popleft()[1].close()

    async def _open_lane(self, lane: bytes) -> ShmLane:
        if len(lane) != _LANE.size or not lane.startswith(_MAGIC):
            raise BatonError(Cause.PROTOCOL, "not a lane of this version")
        _, num_slots, token = _LANE.unpack(lane)
        if not 0 < num_slots <= MAX_CREDIT:
            raise BatonError(Cause.PROTOCOL, f"a ring of {num_slots} slots")
        return ShmLane(await self._listener.claim(token), num_slots)

    async def close(self) -> None:
        await self._scope.close()
        while self._idle:
            self._idle.popleft()[1].close()
        self._listener.close()
