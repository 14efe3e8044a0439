"""The transport within one process: for the offline fleet, for tests, and as the plainest example
of what a transport is."""

import asyncio
import time

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import (
    DeviceFrame,
    DeviceMemory,
    FetchOpen,
    FrameSink,
    FrameSource,
    Outgoing,
)
from baton.kvtransfer.memory import heap_buffer
from baton.kvtransfer.pump import (
    Arrivals,
    Credits,
    FetchScope,
    answer_in_time,
    serve,
    settle,
    take_frames,
)
from baton.types import TransferStats, TransportAddress

_Item = tuple[int, int] | bytes | memoryview


class LocalNetwork:
    """The local transports that can reach one another, by address."""

    def __init__(self) -> None:
        self._transports: dict[str, LocalTransport] = {}

    def join(self, transport: "LocalTransport") -> None:
        if self._transports.setdefault(transport.address, transport) is not transport:
            raise ValueError(f"two local transports called {transport.address!r}")

    def leave(self, transport: "LocalTransport") -> None:
        if self._transports.get(transport.address) is transport:
            del self._transports[transport.address]

    def find(self, address: str) -> "LocalTransport":
        """
        Raises:
            BatonError: TRANSPORT_FAILED; nobody has this address.
        """
        if address not in self._transports:
            raise BatonError(Cause.TRANSPORT_FAILED, f"no local worker at {address!r}")
        return self._transports[address]


class LocalTransport:
    """A `Transport` over a queue."""

    name = "local"

    def __init__(self, network: LocalNetwork, address: str) -> None:
        self.address = address
        self._network = network
        self._source: FrameSource | None = None
        self._scope = FetchScope()

    async def start(self, source: FrameSource) -> TransportAddress:
        self._source = source
        self._network.join(self)
        return TransportAddress(self.name, self.address)

    def reaches(self, peer: TransportAddress) -> bool:
        return True

    async def fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        return await self._scope.run(self._fetch(self._network.find(peer.address), fetch, sink))

    async def _fetch(
        self, producer: "LocalTransport", fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        started_s = time.monotonic()
        link = _Link(fetch.initial_credit)
        serving = asyncio.create_task(producer.serve(fetch, link))
        try:
            sink.opened(*await answer_in_time(link.answer()))
            received = await take_frames(link.frames, sink, fetch.initial_credit, link.give)
            link.done.set()
            await serving
        finally:
            await settle(serving)
        return TransferStats(
            self.name,
            received.num_bytes,
            received.num_frames,
            fetch.range.num_tokens,
            (time.monotonic() - started_s) * 1e3,
        )

    async def serve(self, fetch: FetchOpen, link: "_Link") -> None:
        """The producer's half, for a consumer in this process."""
        assert self._source is not None, "started, or nobody could have found it"
        try:
            await self._scope.run(serve(self._source, fetch, link))
        except BatonError as error:
            link.fail(error)

    async def close(self) -> None:
        self._network.leave(self)
        await self._scope.close()


class _Link:
    """Between the two halves of one fetch."""

    device: DeviceMemory | None = None

    def __init__(self, initial_credit: int) -> None:
        self.credits = Credits(initial_credit)
        self.done = asyncio.Event()
        self._arrivals: Arrivals[_Item] = Arrivals()  # the answer, and frames

    # producer's side

    async def opened(self, epoch: int, num_ready_tokens: int) -> None:
        self._arrivals.put((epoch, num_ready_tokens))

    def buffer(self, num_bytes: int) -> memoryview:
        return heap_buffer(num_bytes)

    async def send(self, frame: Outgoing) -> None:
        assert not isinstance(frame, DeviceFrame), "there is no device"
        self._arrivals.put(memoryview(frame[0]) if len(frame) == 1 else b"".join(frame))

    def fail(self, error: BatonError) -> None:
        self._arrivals.fail(error)

    # consumer's side

    async def answer(self) -> tuple[int, int]:
        (item,) = await self._arrivals.take(1)
        assert isinstance(item, tuple), "opened comes first"
        return item

    async def frames(self, max_frames: int) -> list[bytes | memoryview]:
        return [
            item
            for item in await self._arrivals.take(max_frames)
            if not isinstance(item, tuple)  # opened comes once, and was taken
        ]

    async def give(self, num_frames: int) -> None:
        self.credits.give(num_frames)
