"""`KV.Fetch`, both ends of it: what a producer serves and what a consumer calls.

Every fetch between processes is such a call. It carries opening, credit, failure and cancellation,
and on the gRPC transport the frames too; on others they travel beside it, in a *lane* whose
receiving end the consumer names when it opens the fetch.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, cast

import grpc

from baton import wire
from baton.errors import BatonError, Cause
from baton.grants import HashChain
from baton.kvtransfer.base import (
    DeviceFrame,
    DeviceMemory,
    FetchOpen,
    FrameSource,
    Outgoing,
)
from baton.kvtransfer.fetch_wire import (
    FrameMessages,
    decode_reply,
    encode_reply,
    fetch_open_from_pb,
    fetch_open_to_pb,
)
from baton.kvtransfer.pump import (
    Arrivals,
    Credits,
    FetchScope,
    serve,
    settle,
    uninterrupted,
)
from baton.kvtransfer.staging import StagingBudget
from baton.rpc import ClusterToken, Connection, connect, to_baton_error
from baton.v1 import kv_pb2 as pb

logger = logging.getLogger(__name__)

_SERVICE, _METHOD = "baton.v1.KV", "Fetch"
_LINGER_S = 5.0  # for the last word of a fetch that is over


class Lane(Protocol):
    """The producer's end of one fetch whose frames travel beside the call."""

    device: DeviceMemory | None  # see `base.Staging`

    def buffer(self, num_bytes: int) -> memoryview:
        """See `base.Staging.buffer`."""
        ...

    async def send(self, frame: Outgoing) -> None:
        """Hand one frame over; in order, each once. `DeviceFrame`s only where there is a
        `device`."""
        ...

    async def close(self, is_complete: bool) -> None:
        """Nothing is sent any more. Always called, once.

        Args:
            is_complete: the consumer has verified everything; if not, what carried the frames may
                be what was wrong.
        """
        ...


OpenLane = Callable[[bytes], Awaitable[Lane]]  # from the receiving end that the consumer named


@dataclass(frozen=True, slots=True)
class _Offer:
    source: FrameSource
    scope: FetchScope
    open_lane: OpenLane | None


@dataclass(slots=True)
class _Peer:
    connection: Connection
    num_calls: int = 0
    is_broken: bool = False


class FetchCalls:
    """Serves `KV.Fetch` on a worker's gRPC server and makes such calls to others. One per worker,
    shared by its transports."""

    def __init__(
        self, server: grpc.aio.Server, token: ClusterToken, budget: StagingBudget | None = None
    ) -> None:
        """
        Args:
            budget: of all fetches that are served.
        """
        self._token = token
        self._budget = budget or StagingBudget()
        self._offers: dict[str, _Offer] = {}
        self._peers: dict[str, _Peer] = {}
        self._background: set[asyncio.Task[None]] = set()
        handler = grpc.stream_stream_rpc_method_handler(
            self._serve, pb.FetchRequest.FromString, encode_reply
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),)
        )

    def offer(
        self,
        transport: str,
        source: FrameSource,
        scope: FetchScope,
        open_lane: OpenLane | None = None,
    ) -> None:
        """Serve fetches that ask for `transport`; without `open_lane` the frames go in the call."""
        self._offers[transport] = _Offer(source, scope, open_lane)

    def call(
        self, address: str, transport: str, fetch: FetchOpen, lane: bytes = b""
    ) -> "FetchCall":
        """Open a fetch at host:port. `lane`: the receiving end, for frames beside the call."""
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(connect(address, self._token))
        method = peer.connection.channel.stream_stream(
            f"/{_SERVICE}/{_METHOD}", pb.FetchRequest.SerializeToString, decode_reply
        )
        metadata = peer.connection.metadata
        call = FetchCall(method(metadata=metadata), fetch_open_to_pb(fetch, transport, lane))
        peer.num_calls += 1
        call.reading.add_done_callback(lambda _: self._ended(address, peer, call.is_broken))
        return call

    def _ended(self, address: str, peer: "_Peer", is_broken: bool) -> None:
        """Forget a connection that is broken: the next call makes a new one, and this one is closed
        with its last call."""
        peer.num_calls -= 1
        peer.is_broken |= is_broken
        if peer.is_broken and self._peers.get(address) is peer:
            del self._peers[address]
        if peer.is_broken and not peer.num_calls:
            self._in_background(peer.connection.close())

    def finish(self, call: "FetchCall") -> None:
        """Say the last word of a fetch that is complete, and let its call end by itself."""
        self._in_background(call.finish())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Close all connections. Idempotent; the transports are closed before."""
        if self._background:
            await asyncio.wait(self._background, timeout=_LINGER_S)
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            await peer.connection.close()

    async def _serve(self, _requests: Any, context: Any) -> None:
        """The handler of `KV.Fetch`: failures are told in a reply, with their cause."""
        replies = _Replies(context)
        try:
            request = await context.read()
            if request is grpc.aio.EOF or request.WhichOneof("message") != "open":
                raise BatonError(Cause.PROTOCOL, "a fetch begins with FetchOpen")
            fetch, transport, lane = fetch_open_from_pb(request.open)
            offer = self._offers.get(transport)
            if offer is None:
                raise BatonError(Cause.UNSUPPORTED, f"transport {transport!r} is not offered")
            credits = Credits(fetch.initial_credit, self._budget)
            await offer.scope.run(_serve_call(offer, fetch, lane, context, replies, credits))
        except BatonError as error:
            logger.info("a fetch ended: %s: %s", error.cause.name, error.message)
            detail, cause = error.message[: wire.MAX_DETAIL_LEN], int(error.cause)
            failed = pb.FetchFailed(cause=cause, detail=detail)  # type: ignore[arg-type]
            await replies.write(pb.FetchReply(failed=failed))


async def _serve_call(
    offer: _Offer,
    fetch: FetchOpen,
    lane: bytes,
    context: Any,
    replies: "_Replies",
    credits: Credits,
) -> None:
    opened_lane = None if offer.open_lane is None else await offer.open_lane(lane)
    is_complete = False
    try:
        by_hash = isinstance(fetch.source, HashChain)
        consumer = _CallConsumer(context, replies, credits, opened_lane, by_hash)
        serving = asyncio.create_task(serve(offer.source, fetch, consumer))
        listening = asyncio.create_task(consumer.listen())
        try:
            await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                listening.result()
            await serving
            is_complete = True
        finally:
            await settle(serving, listening)
    finally:
        if opened_lane is not None:
            await uninterrupted(opened_lane.close(is_complete))


class _Replies:
    """Writes to one call. gRPC takes one write at a time, and a write that is cancelled while the
    consumer takes nothing stays in flight: so none is cancelled, and the next one waits for it."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._writing: asyncio.Task[bool] | None = None

    async def write(self, reply: pb.FetchReply | bytes) -> None:
        """
        Raises:
            BatonError: CANCELLED; the call is over.
        """
        if not await asyncio.shield(await self.begin(reply)):
            raise BatonError(Cause.CANCELLED, "the consumer is gone")

    async def begin(self, reply: pb.FetchReply | bytes) -> asyncio.Task[bool]:
        """Write it beside what follows; the result says whether the call was still there."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
        self._writing = asyncio.create_task(self._write(reply))
        return self._writing

    async def _write(self, reply: pb.FetchReply | bytes) -> bool:
        try:
            await self._context.write(reply)
        except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.CancelledError):
            return False
        return True


class _CallConsumer:
    """The consumer at the other end of a call; a `pump.Consumer`."""

    def __init__(
        self,
        context: Any,
        replies: "_Replies",
        credits: Credits,
        lane: Lane | None,
        by_hash: bool,
    ) -> None:
        self.credits = credits
        self.done = asyncio.Event()
        self.device = None if lane is None else lane.device
        self._context = context
        self._replies = replies
        self._lane = lane
        self._by_hash = by_hash
        self._messages = FrameMessages()

    async def opened(self, epoch: int, num_ready_tokens: int) -> None:
        if self._by_hash:
            await self._replies.write(pb.FetchReply(have=pb.FetchHave(num_tokens=num_ready_tokens)))
        opened = pb.FetchOpened(epoch=epoch, num_ready_tokens=num_ready_tokens)
        # Frames beside the call need not wait until it has left, nor do those in it but for their
        # turn. If the call is over, `listen` hears of it.
        await self._replies.begin(pb.FetchReply(opened=opened))

    def buffer(self, num_bytes: int) -> memoryview:
        return (self._lane or self._messages).buffer(num_bytes)

    async def send(self, frame: Outgoing) -> None:
        if self._lane is not None:
            await self._lane.send(frame)
        else:
            assert not isinstance(frame, DeviceFrame), "there is no device"
            await self._replies.write(self._messages.take(frame))

    async def listen(self) -> None:
        """Take what the consumer says, until it is done.

        Raises:
            BatonError: it hung up before it was done, or said what no correct consumer says.
        """
        while not self.done.is_set():
            request = await self._context.read()
            if request is grpc.aio.EOF:
                raise BatonError(Cause.CANCELLED, "the consumer hung up")
            match request.WhichOneof("message"):
                case "credit":
                    self.credits.give(request.credit.num_frames)
                case "done":
                    self.done.set()
                case kind:
                    raise BatonError(Cause.PROTOCOL, f"{kind} in the middle of a fetch")


class FetchCall:
    """The consumer's end of one call.

    A task of its own reads it: cancelling a read would cancel the call. What it has read waits in
    a queue that the credit bounds. Whatever ends the call early is raised to whoever takes from it.
    """

    def __init__(self, call: Any, opening: pb.FetchOpen) -> None:
        self._call = call
        self._opening = opening
        self._by_hash = opening.WhichOneof("source") == "chain"
        # Replies: the answer, which has two parts by hash, and frames.
        self._num_allowed = 1 + self._by_hash + opening.initial_credit
        self._replies: Arrivals[pb.FetchReply | memoryview] = Arrivals()
        self._tell: Callable[[BatonError], None] | None = None
        self.is_broken = False  # the connection, as far as can be known
        self.reading = asyncio.create_task(self._read_all())

    async def answer(self) -> tuple[int, int]:
        """Open the fetch: (epoch, num_ready_tokens); by hash, these are all there will be."""
        await self._write(pb.FetchRequest(open=self._opening))
        have = await self._expect("have") if self._by_hash else None
        opened = (await self._expect("opened")).opened
        return opened.epoch, opened.num_ready_tokens if have is None else have.have.num_tokens

    async def _expect(self, kind: str) -> pb.FetchReply:
        (reply,) = await self._replies.take(1)
        if isinstance(reply, memoryview) or reply.WhichOneof("message") != kind:
            raise BatonError(Cause.PROTOCOL, f"a fetch is answered with {kind!r} first")
        return reply

    async def frames(self, max_frames: int) -> list[memoryview]:
        """The next ones, at least one.

        Raises:
            BatonError: whatever ended the call.
        """
        frames: list[memoryview] = []
        for reply in await self._replies.take(max_frames):
            if not isinstance(reply, memoryview):
                raise BatonError(Cause.PROTOCOL, f"{reply.WhichOneof('message')} among frames")
            frames.append(reply)
        return frames

    def watch(self, tell: Callable[[BatonError], None] | None) -> None:
        """For fetches whose frames do not come this way: `tell` why the call ended, when it does.
        None: nobody has to know any more."""
        self._tell = tell
        self._told()

    def _told(self) -> None:
        if self._tell is None:
            return
        if len(self._replies):
            self._tell(BatonError(Cause.PROTOCOL, "a reply in a call beside the frames"))
        elif self._replies.error is not None:
            self._tell(self._replies.error)

    async def give(self, num_frames: int) -> None:
        self._num_allowed += num_frames
        await self._write(pb.FetchRequest(credit=pb.FetchCredit(num_frames=num_frames)))

    async def finish(self) -> None:
        """The last word: everything is verified. Waits until the producer has heard it, but not
        for long."""
        await self._write(pb.FetchRequest(done=pb.FetchDone()))
        await asyncio.wait({self.reading}, timeout=_LINGER_S)
        await self.cancel()

    async def cancel(self, cause: BaseException | None = None) -> None:
        """Tell the producer that nobody reads any more, because of `cause`. Idempotent."""
        if isinstance(cause, BatonError) and cause.cause is Cause.TRANSFER_STALLED:
            self.is_broken = True  # it may be the connection that is silent, not the producer
        self._call.cancel()
        await settle(self.reading)

    async def _write(self, request: pb.FetchRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            logger.debug("the call has ended; whoever takes from it gets the reason")

    async def _read_all(self) -> None:
        try:
            while True:
                reply = await self._call.read()
                self._replies.put(self._checked(reply))
                self._told()
        except grpc.aio.AioRpcError as error:
            failure = to_baton_error(error)
            self.is_broken |= failure.cause is Cause.TRANSPORT_FAILED
            self._replies.fail(failure)
        except BatonError as error:
            self._replies.fail(error)
        self._told()

    def _checked(self, reply: Any) -> pb.FetchReply | memoryview:
        if reply is grpc.aio.EOF:
            raise BatonError(Cause.TRANSPORT_FAILED, "the call ended before the fetch did")
        if not isinstance(reply, memoryview) and reply.WhichOneof("message") == "failed":
            raise BatonError(wire.cause_from_pb(reply.failed.cause), reply.failed.detail)
        self._num_allowed -= 1
        if self._num_allowed < 0:
            raise BatonError(Cause.PROTOCOL, "more frames than there was credit for")
        return cast("pb.FetchReply | memoryview", reply)
