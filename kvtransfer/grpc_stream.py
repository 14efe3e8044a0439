"""The transport that is always there: frames inside the `KV.Fetch` call."""

import time

from baton.kvtransfer.base import FetchOpen, FrameSink, FrameSource
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.pump import FetchScope, answer_in_time, take_frames
from baton.types import TransferStats, TransportAddress


class GrpcTransport:
    """A `Transport` over the worker's own gRPC server and port."""

    name = "grpc"

    def __init__(self, calls: FetchCalls, address: str) -> None:
        """
        Args:
            address: host:port at which others reach the server behind `calls`.
        """
        self._calls = calls
        self._address = address
        self._scope = FetchScope()

    async def start(self, source: FrameSource) -> TransportAddress:
        self._calls.offer(self.name, source, self._scope)
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
        call = self._calls.call(peer.address, self.name, fetch)
        try:
            sink.opened(*await answer_in_time(call.answer()))
            received = await take_frames(call.frames, sink, fetch.initial_credit, call.give)
        except BaseException as error:
            await call.cancel(error)
            raise
        self._calls.finish(call)
        return TransferStats(
            self.name,
            received.num_bytes,
            received.num_frames,
            fetch.range.num_tokens,
            (time.monotonic() - started_s) * 1e3,
        )

    async def close(self) -> None:
        await self._scope.close()
