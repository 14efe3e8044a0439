"""The gRPC side of a pooling worker: `Worker.Pool`, and a session that carries heartbeats and load.

`KV.Inventory` is there too, and empty: a gateway asks every worker for its prefixes.
"""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from baton import wire
from baton.errors import BatonError, Cause
from baton.failpoints import Failpoints
from baton.messages import Abort, Failed, GatewayMessage, Heartbeat, Hello, Release, StepBatch
from baton.session_wire import SERVICE, serve_sessions
from baton.types import WorkerInfo, WorkerSnapshot
from baton.v1 import kv_pb2, worker_pb2
from baton.wire_pooling import pool_reply_to_pb, pool_request_from_pb
from baton.worker.pooling_desk import PoolingDesk
from baton.worker.service import SERVICES

log = logging.getLogger(__name__)


class PoolingService:
    """Adds its handlers to a worker's server."""

    def __init__(
        self,
        info: WorkerInfo,
        desk: PoolingDesk,
        snapshot: Callable[[], WorkerSnapshot],
        failpoints: Failpoints,
    ) -> None:
        self._failpoints = failpoints
        self._info = info
        self._desk = desk
        self._snapshot = snapshot

    def add_to(self, server: grpc.aio.Server) -> None:
        serve_sessions(server, self._session)
        pool = grpc.unary_unary_rpc_method_handler(
            self._pool,
            worker_pb2.PoolRequest.FromString,
            worker_pb2.PoolReply.SerializeToString,
        )
        inventory = grpc.unary_stream_rpc_method_handler(
            self._send_inventory,
            kv_pb2.InventoryRequest.FromString,
            kv_pb2.InventoryReply.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, {"Pool": pool}),
                grpc.method_handlers_generic_handler(SERVICES[1], {"Inventory": inventory}),
            )
        )

    async def _pool(self, message: Any, _context: Any) -> worker_pb2.PoolReply:
        self._failpoints.hit("pool")
        results = await self._desk.pool(pool_request_from_pb(message))
        self._failpoints.hit("pooled")
        return pool_reply_to_pb(results)

    async def _session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        log.info("session with %s", context.peer())
        yield wire.worker_message_to_pb(Hello(self._info))
        async for request in requests:
            try:
                answer = self._answer(wire.gateway_message_from_pb(request))
            except BatonError as error:
                log.warning("%s sent nonsense: %s", context.peer(), error.message)
                return
            if answer is not None:
                yield wire.worker_message_to_pb(answer)

    def _answer(self, message: GatewayMessage) -> StepBatch | None:
        match message:
            case Heartbeat(seq):
                return StepBatch((), self._snapshot(), heartbeat_seq=seq)
            case Abort() | Release():
                return None
        refused = Failed(message.leg, Cause.UNSUPPORTED, "a pooling worker takes no legs")
        return StepBatch((refused,), self._snapshot())

    async def _send_inventory(
        self, _request: Any, _context: Any
    ) -> AsyncIterator[kv_pb2.InventoryReply]:
        yield kv_pb2.InventoryReply()
