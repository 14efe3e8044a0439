"""The gRPC side of a worker: `Worker.Session` with gateways, and `KV.Inventory`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc

from baton import wire
from baton.errors import BatonError, Cause
from baton.messages import LegMessage, StepBatch, WorkerMessage
from baton.session_wire import SERVICE, serve_sessions
from baton.types import BlockHash, LegId, Request
from baton.v1 import kv_pb2, worker_pb2
from baton.worker.effects import SessionId
from baton.worker.runtime import WorkerRuntime
from baton.worker.scores import Scored

log = logging.getLogger(__name__)

MAX_UNSENT = 1024  # batches; a gateway that reads none of them has lost its session
FLUSH_S = 1.0  # for the last words to gateways that read
SCORES_CHUNK = 1024  # tokens in one message
INVENTORY_CHUNK = 4096  # hashes in one message
SERVICES = (SERVICE, "baton.v1.KV")

Inventory = Callable[[], tuple[int, list[BlockHash]]]
Score = Callable[[Request], AsyncGenerator[Scored]]
Refuse = Callable[[LegId, BatonError], None]


class StreamPort:
    """A `SessionPort` over one stream: what is to be sent waits in a bounded queue."""

    def __init__(self) -> None:
        self._unsent: asyncio.Queue[WorkerMessage] = asyncio.Queue(MAX_UNSENT)
        self.closed: asyncio.Future[BatonError] = asyncio.get_running_loop().create_future()

    def send(self, message: WorkerMessage) -> None:
        try:
            self._unsent.put_nowait(message)
        except asyncio.QueueFull:
            self.close(Cause.SESSION_LOST, "the gateway does not read")

    def close(self, cause: Cause, detail: str) -> None:
        if not self.closed.done():
            self.closed.set_result(BatonError(cause, detail))

    async def write_to(self, context: Any, refuse: Refuse) -> None:
        """Until cancelled, or the stream breaks. `refuse` is told of legs with a message that has
        no form on the wire: a defect, but of one request."""
        while True:
            message = await self._unsent.get()
            await context.write(_encoded(message, refuse))
            self._unsent.task_done()

    async def flushed(self) -> None:
        """Returns when everything was written."""
        await self._unsent.join()


class WorkerService:
    """Adds its handlers to a worker's server."""

    def __init__(self, runtime: WorkerRuntime, inventory: Inventory, score: Score) -> None:
        self._runtime = runtime
        self._get_scores = score
        self._inventory = inventory
        self._ports: set[StreamPort] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        serve_sessions(server, self._session)
        inventory = grpc.unary_stream_rpc_method_handler(
            self._send_inventory,
            kv_pb2.InventoryRequest.FromString,
            kv_pb2.InventoryReply.SerializeToString,
        )
        score = grpc.unary_stream_rpc_method_handler(
            self._score,
            worker_pb2.ScoreRequest.FromString,
            worker_pb2.ScoreReply.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, {"Score": score}),
                grpc.method_handlers_generic_handler(SERVICES[1], {"Inventory": inventory}),
            )
        )

    async def close(self) -> None:
        """End every session, what was told last included; gateways go elsewhere."""
        ports = list(self._ports)
        flushing = [asyncio.create_task(port.flushed()) for port in ports]
        if flushing:
            _, stuck = await asyncio.wait(flushing, timeout=FLUSH_S)
            for task in stuck:
                task.cancel()
        for port in ports:
            port.close(Cause.DRAINING, "the worker is shutting down")

    async def _session(self, requests: AsyncIterator[Any], context: Any) -> None:
        port = StreamPort()
        self._ports.add(port)
        session = self._runtime.session_opened(port)
        log.info("session %d with %s", session, context.peer())
        reading = asyncio.create_task(self._read(session, requests))
        writing = asyncio.create_task(
            port.write_to(context, lambda leg, error: self._runtime.reject(session, leg, error))
        )
        ends: set[asyncio.Future[Any]] = {reading, writing, port.closed}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            reason = port.closed.result() if port.closed.done() else None
        finally:
            self._ports.discard(port)
            self._runtime.session_lost(session)
            await _end(reading, writing)
            log.info("session %d is over", session)
        if reason is not None:
            raise reason

    async def _read(self, session: SessionId, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            try:
                message = wire.gateway_message_from_pb(request)
            except BatonError as error:
                leg = wire.leg_of_gateway_message(request)
                if leg is None:
                    log.warning("session %d sent nonsense: %s", session, error.message)
                    return
                self._runtime.reject(session, leg, error)
            else:
                self._runtime.receive(session, message)

    async def _score(self, message: Any, _context: Any) -> AsyncIterator[worker_pb2.ScoreReply]:
        request = wire.score_request_from_pb(message)
        async with aclosing(self._get_scores(request)) as scores:
            async for start, logprobs in scores:
                for index in range(0, len(logprobs), SCORES_CHUNK):
                    part = logprobs[index : index + SCORES_CHUNK]
                    yield wire.score_reply_to_pb(start + index, part)

    async def _send_inventory(
        self, _request: Any, _context: Any
    ) -> AsyncIterator[kv_pb2.InventoryReply]:
        seq, hashes = self._inventory()
        for start in range(0, max(len(hashes), 1), INVENTORY_CHUNK):
            yield kv_pb2.InventoryReply(seq=seq, hashes=hashes[start : start + INVENTORY_CHUNK])


def _encoded(message: WorkerMessage, refuse: Refuse) -> worker_pb2.WorkerMessage:
    try:
        return wire.worker_message_to_pb(message)
    except (TypeError, ValueError):
        if not isinstance(message, StepBatch):
            raise
        unsound = [item for item in message.messages if not _has_form(item)]
        if not unsound:
            raise
        log.exception("%d messages cannot be sent", len(unsound))
    for item in unsound:
        refuse(item.leg, BatonError(Cause.INTERNAL, "what it has to say cannot be sent"))
    rest = tuple(item for item in message.messages if item not in unsound)
    return wire.worker_message_to_pb(replace(message, messages=rest))


def _has_form(item: LegMessage) -> bool:
    try:
        wire.leg_message_to_pb(item)
    except (TypeError, ValueError):
        return False
    return True


async def _end(*tasks: asyncio.Task[None]) -> None:
    """Cancel both halves of a stream. How they ended is of no interest: the stream is over."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            log.debug("a session's stream ended: %r", result)
