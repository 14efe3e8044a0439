"""A worker without an engine: it answers at once, and brings tokens as fast as they are taken.

For `bench.gateway`. One leg a request (role both), real session, registration and heartbeats; all
legs that are open get one token in each batch, as they would from an engine's step.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from baton.locality import WorkerRegistration
from baton.messages import (
    Abort,
    Admitted,
    ComputeLocally,
    GatewayMessage,
    Heartbeat,
    Hello,
    LegMessage,
    Queued,
    Release,
    StepBatch,
)
from baton.redis_client import connect
from baton.rpc import ClusterToken, RpcServer
from baton.session_wire import serve_sessions
from baton.types import (
    FinishReason,
    KVGroup,
    KVKind,
    KVLayout,
    LegId,
    Request,
    Role,
    TokenChunk,
    WorkerInfo,
    WorkerSnapshot,
)
from baton.v1 import kv_pb2, kv_pb2_grpc
from baton.wire import gateway_message_from_pb, worker_message_to_pb

NUM_BLOCKS = 1 << 20


class NullWorker(kv_pb2_grpc.KVServicer):
    """`token_ids`: what every answer consists of, over and over."""

    def __init__(self, info: WorkerInfo, token_ids: Sequence[int]) -> None:
        self._info = info
        self._token_ids = token_ids
        self._legs: dict[LegId, tuple[Request, int]] = {}  # → tokens brought so far
        self._said: list[LegMessage] = []
        self._beats: list[int] = []
        self._changed = asyncio.Event()

    async def session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        reader = asyncio.create_task(self._read(requests))
        try:
            yield worker_message_to_pb(Hello(self._info))
            while not reader.done():
                if not (self._legs or self._said or self._beats):
                    self._changed.clear()
                    await self._changed.wait()
                yield worker_message_to_pb(self._step())
                await asyncio.sleep(0)  # the reader's turn
        finally:
            reader.cancel()

    async def Inventory(
        self, request: kv_pb2.InventoryRequest, context: Any
    ) -> AsyncIterator[kv_pb2.InventoryReply]:
        yield kv_pb2.InventoryReply(seq=0)

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for raw in requests:
            self._handle(gateway_message_from_pb(raw))
            self._changed.set()
        self._changed.set()

    def _handle(self, message: GatewayMessage) -> None:
        match message:
            case Heartbeat(seq):
                self._beats.append(seq)
            case ComputeLocally(leg, request):
                self._said += [Queued(leg), Admitted(leg, 0)]
                self._legs[leg] = (request, 0)
            case Abort(leg) | Release(leg):
                self._legs.pop(leg, None)
            case _:
                raise ValueError(f"a null worker only computes locally, not {message}")

    def _step(self) -> StepBatch:
        said, self._said = self._said, []
        for leg, (request, index) in list(self._legs.items()):
            max_tokens = request.sampling.max_tokens or 1
            is_last = index + 1 >= max_tokens
            reason = FinishReason.LENGTH if is_last else None
            token_id = self._token_ids[index % len(self._token_ids)]
            said.append(TokenChunk(leg, 0, index, (token_id,), finish_reason=reason))
            if is_last:
                del self._legs[leg]
            else:
                self._legs[leg] = (request, index + 1)
        snapshot = WorkerSnapshot(Role.BOTH, free_blocks=NUM_BLOCKS, total_blocks=NUM_BLOCKS)
        seq = self._beats.pop(0) if self._beats else 0
        return StepBatch(tuple(said), snapshot, heartbeat_seq=seq)


def null_info(address: str, vocab_size: int) -> WorkerInfo:
    return WorkerInfo(
        worker_id="null-0",
        incarnation=secrets.token_bytes(16),
        role=Role.BOTH,
        model="null",
        fingerprint=bytes(32),
        layout=KVLayout((KVGroup(KVKind.FULL, 1, 1, 64, "float32"),), 16),
        address=address,
        transports=(),
        host_id="null",
        pid=os.getpid(),
        device="none",
        num_blocks=NUM_BLOCKS,
        max_model_len=32_768,
        max_num_seqs=4096,
        vocab_size=vocab_size,
        eos_token_ids=(),
    )


async def serve(redis_url: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Until cancelled or ended."""
    server = RpcServer(ClusterToken())
    port = server.bind("127.0.0.1", 0)
    info = null_info(f"127.0.0.1:{port}", vocab_size)
    worker = NullWorker(info, token_ids)
    serve_sessions(server.grpc, worker.session)
    kv_pb2_grpc.add_KVServicer_to_server(worker, server.grpc)
    await server.start()
    await WorkerRegistration(connect(redis_url), "default", (), info).run()
