"""A worker behind a real gRPC server that plays by the book without engine: token i is i + 10."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from baton.messages import (
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    GatewayMessage,
    Heartbeat,
    Hello,
    Imported,
    LegMessage,
    Queued,
    StepBatch,
    Submit,
    WorkerMessage,
)
from baton.rpc import ClusterToken, RpcServer
from baton.session_wire import serve_sessions
from baton.types import (
    BlockHash,
    FinishReason,
    LegId,
    Request,
    Role,
    TokenChunk,
    TransferStats,
    WorkerInfo,
    WorkerSnapshot,
)
from baton.v1 import kv_pb2, kv_pb2_grpc
from baton.wire import gateway_message_from_pb, worker_message_to_pb
from tests.gateway.support import ticket, worker_info

STATS = TransferStats("grpc", num_bytes=4096, num_frames=1, num_tokens=8, duration_ms=1.0)


def token(index: int) -> int:
    return index + 10


class ScriptedWorker(kv_pb2_grpc.KVServicer):
    """`hold`: legs begin, but bring tokens only once it is set. `is_silent`: it says nothing."""

    def __init__(self, worker_id: str, role: Role) -> None:
        self.info: WorkerInfo = worker_info(worker_id, role)
        self.received: list[GatewayMessage] = []
        self.num_sessions = 0
        self.is_silent = False
        self.is_reading = True
        self.hold = asyncio.Event()
        self.hold.set()
        self.hashes: list[BlockHash] = []
        self._out: asyncio.Queue[WorkerMessage | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: RpcServer | None = None

    async def start(self, port: int = 0) -> None:
        server = self._server = RpcServer(ClusterToken())
        serve_sessions(server.grpc, self.session)
        kv_pb2_grpc.add_KVServicer_to_server(self, server.grpc)  # type: ignore[no-untyped-call]
        port = server.bind("127.0.0.1", port)
        self.info = replace(self.info, address=f"127.0.0.1:{port}")
        await server.start()

    @property
    def port(self) -> int:
        return int(self.info.address.rpartition(":")[2])

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(grace_s=0)
            self._server = None

    async def session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.num_sessions += 1
        self._out = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests))
        try:
            yield worker_message_to_pb(Hello(self.info))
            while (message := await self._out.get()) is not None:
                if not self.is_silent:
                    yield worker_message_to_pb(message)
        finally:
            reader.cancel()

    async def Inventory(
        self, request: kv_pb2.InventoryRequest, context: Any
    ) -> AsyncIterator[kv_pb2.InventoryReply]:
        yield kv_pb2.InventoryReply(seq=7, hashes=self.hashes)

    def end_session(self) -> None:
        self._out.put_nowait(None)

    def say(self, *messages: LegMessage, seq: int = 0) -> None:
        info = self.info
        snapshot = WorkerSnapshot(
            info.role, free_blocks=info.num_blocks, total_blocks=info.num_blocks
        )
        self._out.put_nowait(StepBatch(messages, snapshot, heartbeat_seq=seq))

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for raw in requests:
            message = gateway_message_from_pb(raw)
            if isinstance(message, Heartbeat):
                self.say(seq=message.seq)
                continue
            self.received.append(message)
            task = asyncio.create_task(self._answer(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            while not self.is_reading:
                await asyncio.sleep(0.05)

    async def _answer(self, message: GatewayMessage) -> None:
        match message:
            case Submit(leg, request):
                num_tokens = len(request.prompt_token_ids)
                self.say(Queued(leg), Admitted(leg, 0, ticket(self.info, num_tokens)))
                await self.hold.wait()
                self._bring(leg, request, 0, 1)
            case Bind(leg, request):
                self.say(Bound(leg, 0))
                self.say(Imported(leg, STATS))
                await self._decode(leg, request)
            case ComputeLocally(leg, request):
                self.say(Queued(leg), Admitted(leg, 0))
                await self._decode(leg, request)
            case _:
                pass

    async def _decode(self, leg: LegId, request: Request) -> None:
        first = len(request.committed(0))
        self._bring(leg, request, first, first + 1)
        await self.hold.wait()
        assert request.sampling.max_tokens is not None
        self._bring(leg, request, first + 1, request.sampling.max_tokens)

    def _bring(self, leg: LegId, request: Request, start: int, stop: int) -> None:
        for choice in request.open_choices():
            for index in range(start, stop):
                is_last = index + 1 == request.sampling.max_tokens
                reason = FinishReason.LENGTH if is_last else None
                self.say(TokenChunk(leg, choice, index, (token(index),), finish_reason=reason))
