"""`Worker.Session` and `KV.Inventory` over a real gRPC server, in front of a worker without a
model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
import torch

from baton import wire
from baton.engine.config import EngineConfig
from baton.engine.core import EngineCore
from baton.engine.null_runner import NullModel, NullRunner
from baton.errors import BatonError, Cause
from baton.failpoints import Failpoints
from baton.gateway.scores import fetch_scores
from baton.grants import GrantKeys
from baton.kvtransfer.local import LocalNetwork, LocalTransport
from baton.kvtransfer.memory import KVMemory
from baton.messages import (
    ComputeLocally,
    Failed,
    GatewayMessage,
    Heartbeat,
    Hello,
    StepBatch,
    Submit,
    WorkerMessage,
)
from baton.rpc import ClusterToken, RpcServer, connect, is_serving, to_baton_error
from baton.session_wire import open_session
from baton.totals import STEP_TOKENS, WorkerTotals
from baton.types import (
    BlockHash,
    KVGroup,
    KVKind,
    KVLayout,
    LegId,
    Request,
    Role,
    SamplingParams,
    TokenChunk,
    WorkerInfo,
)
from baton.v1 import kv_pb2, kv_pb2_grpc, worker_pb2
from baton.worker import service as service_module
from baton.worker.data_plane import DataPlane
from baton.worker.policy import WorkerPolicy
from baton.worker.service import SERVICES, StreamPort, WorkerService
from baton.worker.worker import Worker

TOKEN = ClusterToken(("secret",))
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 1, 1, 4, "float32"),), block_size=16)
NUM_BLOCKS = 600
HASHES = [BlockHash(bytes([i % 256, i // 256]) * 16) for i in range(5000)]
MODEL = NullModel()


@dataclass
class Served:
    worker: Worker
    address: str


async def make_worker(failpoints: Failpoints) -> Worker:
    layout_shape = (1, 2, NUM_BLOCKS, 16, 1, 4)
    memory = KVMemory(torch.zeros(layout_shape), LAYOUT)
    plane = DataPlane(memory, [LocalTransport(LocalNetwork(), "w")])
    config = EngineConfig(num_blocks=NUM_BLOCKS, max_num_batched_tokens=128)
    info = WorkerInfo(
        worker_id="w",
        incarnation=b"i" * 16,
        role=Role.BOTH,
        model="null",
        fingerprint=b"f" * 32,
        layout=LAYOUT,
        address="127.0.0.1:1",
        transports=await plane.start(),
        host_id="h",
        pid=1,
        device="cpu",
        num_blocks=NUM_BLOCKS,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=MODEL.vocab_size,
        eos_token_ids=(),
    )
    core = EngineCore(config, NullRunner(NUM_BLOCKS, 16, MODEL))
    return Worker(info, WorkerPolicy(), core, plane, GrantKeys("test", ()), failpoints=failpoints)


@pytest.fixture
def failpoints() -> Failpoints:
    return Failpoints(["submit:1=error"])


@pytest.fixture
async def served(failpoints: Failpoints) -> AsyncIterator[Served]:
    worker = await make_worker(failpoints)
    server = RpcServer(TOKEN)
    port = server.bind("127.0.0.1", 0)
    service = WorkerService(worker.runtime, lambda: (7, HASHES), worker.score)
    service.add_to(server.grpc)
    worker.start()
    await server.start(SERVICES)
    await server.set_serving(True)
    yield Served(worker, f"127.0.0.1:{port}")
    await service.close()
    await worker.close()
    await server.stop(1.0)


class Session:
    """A gateway's end; its heart beats until `close`."""

    def __init__(self, address: str, token: ClusterToken = TOKEN) -> None:
        self._connection = connect(address, token)
        self.call: Any = open_session(self._connection)
        self._lock = asyncio.Lock()
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while not self.call.done():
            await asyncio.sleep(0.5)
            await self.send(Heartbeat(1_000))

    async def send(self, message: GatewayMessage) -> None:
        async with self._lock:
            await self.call.write(wire.gateway_message_to_pb(message))

    async def close(self) -> None:
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        self.call.cancel()
        await self._connection.close()

    async def receive(self) -> WorkerMessage:
        async with asyncio.timeout(10):
            reply = await self.call.read()
        assert reply is not grpc.aio.EOF
        return wire.worker_message_from_pb(reply)

    async def messages(self) -> AsyncIterator[Any]:
        while True:
            batch = await self.receive()
            assert isinstance(batch, StepBatch)
            for message in batch.messages:
                yield message

    async def failed(self) -> Failed:
        async for message in self.messages():
            if isinstance(message, Failed):
                return message
        raise AssertionError


@pytest.fixture
async def session(served: Served) -> AsyncIterator[Session]:
    opened = Session(served.address)
    hello = await opened.receive()
    assert hello == Hello(served.worker.info)
    yield opened
    await opened.close()


def request(request_id: str = "r", **changes: Any) -> Request:
    sampling = SamplingParams(**{"seed": 1, "max_tokens": 8, **changes})
    return Request(request_id, tuple(range(40)), sampling)


async def test_a_request_over_a_session(session: Session) -> None:
    asked = request()
    await session.send(ComputeLocally(LegId("r", 1), asked))
    tokens: list[int] = []
    async for message in session.messages():
        if isinstance(message, TokenChunk):
            tokens += message.token_ids
            if message.finish_reason is not None:
                break
    assert tuple(tokens) == MODEL.generate(asked.prompt_token_ids, asked.sampling)


async def test_heartbeats_are_answered(session: Session) -> None:
    await session.send(Heartbeat(3))
    beat = await session.receive()
    assert isinstance(beat, StepBatch)
    assert beat.heartbeat_seq == 3
    assert beat.snapshot.total_blocks == NUM_BLOCKS
    assert beat.totals == WorkerTotals()


async def test_heartbeats_tell_what_was_counted(served: Served, session: Session) -> None:
    await session.send(ComputeLocally(LegId("r", 1), request(max_tokens=5, ignore_eos=True)))
    async for message in session.messages():
        if isinstance(message, TokenChunk) and message.finish_reason is not None:
            break
    served.worker.runtime.machine.producer.leases.counts["expired"] += 2
    await session.send(Heartbeat(3))
    while not isinstance(beat := await session.receive(), StepBatch) or beat.heartbeat_seq != 3:
        pass
    assert beat.totals is not None
    assert beat.totals.num_expired_leases == 2
    assert beat.totals.num_step_tokens == 40 + 4, "the prompt gives the first token"
    counts = dict(zip(STEP_TOKENS, beat.totals.steps_by_tokens, strict=False))
    assert {bound: count for bound, count in counts.items() if count} == {64: 1, 1: 4}


async def test_a_malformed_request_fails_and_the_session_goes_on(session: Session) -> None:
    message = wire.gateway_message_to_pb(ComputeLocally(LegId("bad", 1), request("bad")))
    message.compute_locally.request.sampling.n = 0
    await session.call.write(message)
    failed = await session.failed()
    assert (failed.leg, failed.cause) == (LegId("bad", 1), Cause.PROTOCOL)
    await session.send(Heartbeat(4))
    beat = await session.receive()
    assert isinstance(beat, StepBatch)
    assert beat.heartbeat_seq == 4


async def test_nonsense_ends_the_session_alone(served: Served, session: Session) -> None:
    await session.call.write(worker_pb2.GatewayMessage())
    async with asyncio.timeout(10):
        assert await session.call.read() is grpc.aio.EOF
    assert await is_serving(served.address)


async def test_a_failpoint_fails_one_request(session: Session) -> None:
    await session.send(Submit(LegId("r", 1), request()))
    assert (await session.failed()).cause is Cause.STEP_FAILED
    await session.send(Submit(LegId("r", 2), request()))
    async for message in session.messages():
        if isinstance(message, TokenChunk):
            break


async def test_a_cut_session_frees_everything(served: Served, session: Session) -> None:
    await session.send(ComputeLocally(LegId("r", 1), request(max_tokens=4000, ignore_eos=True)))
    async for message in session.messages():
        if isinstance(message, TokenChunk):
            break
    session.call.cancel()
    pool = served.worker.core.pool
    async with asyncio.timeout(10):
        while not (served.worker.is_idle and pool.num_free == NUM_BLOCKS):
            await asyncio.sleep(0.01)


async def test_a_gateway_that_does_not_read_loses_its_session(
    served: Served, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []

    class WatchedPort(StreamPort):
        def close(self, cause: Cause, detail: str) -> None:
            reasons.append(detail)
            super().close(cause, detail)

    monkeypatch.setattr(service_module, "StreamPort", WatchedPort)  # for sessions from now on
    monkeypatch.setattr(service_module, "MAX_UNSENT", 4)
    deaf = Session(served.address)
    await deaf.receive()
    endless = request(max_tokens=4000, n=8, logprobs=20)
    with contextlib.suppress(grpc.aio.AioRpcError):  # it may be lost before all are sent
        for number in range(4):
            await deaf.send(ComputeLocally(LegId(f"r{number}", 1), endless))
    async with asyncio.timeout(60):
        while not reasons or len(served.worker.runtime._ports) > 1:
            await asyncio.sleep(0.01)
    assert reasons[0] == "the gateway does not read"
    await session.send(Heartbeat(1))  # the other session lives
    assert isinstance(await session.receive(), StepBatch)
    await deaf.close()


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda chunk: chunk._replace(token_ids=(2**32,)),
        lambda chunk: Failed(chunk.leg, Cause.STEP_FAILED, "\ud800"),
    ],
    ids=["a number too large", "a lone surrogate"],
)
async def test_what_cannot_be_sent_fails_its_own_leg(
    served: Served, spoiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SpoilingPort(StreamPort):
        def send(self, message: WorkerMessage) -> None:
            if isinstance(message, StepBatch):
                items = [
                    spoiled(item) if item.leg == bad and isinstance(item, TokenChunk) else item
                    for item in message.messages
                ]
                message = replace(message, messages=tuple(items))
            super().send(message)

    bad, good = LegId("bad", 1), LegId("good", 1)
    monkeypatch.setattr(service_module, "StreamPort", SpoilingPort)
    session = Session(served.address)
    await session.receive()
    asked = request("good", max_tokens=200, ignore_eos=True)
    await session.send(ComputeLocally(good, asked))
    # Fewer steps than may be unsent: this engine is faster than any reader.
    await session.send(ComputeLocally(bad, request("bad", max_tokens=600, ignore_eos=True)))
    tokens: list[int] = []
    failed: list[Failed] = []
    async for message in session.messages():
        if isinstance(message, Failed):
            failed.append(message)
        elif isinstance(message, TokenChunk):
            tokens += message.token_ids
        if failed and len(tokens) == 200:
            break
    assert tuple(tokens) == MODEL.generate(asked.prompt_token_ids, asked.sampling)
    assert {(message.leg, message.cause) for message in failed} == {(bad, Cause.INTERNAL)}
    async with asyncio.timeout(10):
        while not (served.worker.is_idle and served.worker.core.pool.num_free == NUM_BLOCKS):
            await asyncio.sleep(0.01)
    await session.close()


async def test_sessions_need_the_token(served: Served) -> None:
    stranger = Session(served.address, ClusterToken(("wrong",)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stranger.call.read()
    assert to_baton_error(caught.value).cause is Cause.UNAUTHENTICATED
    await stranger.close()


async def test_the_inventory_comes_in_pieces(served: Served) -> None:
    connection = connect(served.address, TOKEN)
    stub = kv_pb2_grpc.KVStub(connection.channel)  # type: ignore[no-untyped-call]
    replies = [
        reply
        async for reply in stub.Inventory(kv_pb2.InventoryRequest(), metadata=connection.metadata)
    ]
    assert len(replies) > 1
    assert {reply.seq for reply in replies} == {7}
    assert [value for reply in replies for value in reply.hashes] == HASHES
    await connection.close()


async def test_drain_hands_over_what_does_not_finish(served: Served, session: Session) -> None:
    await session.send(ComputeLocally(LegId("r", 1), request(max_tokens=4000, ignore_eos=True)))
    async for message in session.messages():
        if isinstance(message, TokenChunk):
            break
    draining = asyncio.create_task(served.worker.drain(0.05))
    assert (await session.failed()).cause is Cause.DRAINING
    await draining
    assert served.worker.is_idle
    await session.send(ComputeLocally(LegId("s", 1), request("s")))
    assert (await session.failed()).cause is Cause.DRAINING


async def test_a_broken_engine_is_told(served: Served, session: Session) -> None:
    def explode() -> None:
        raise RuntimeError("a defect")

    served.worker.core.begin = explode  # type: ignore[method-assign,assignment]
    await session.send(ComputeLocally(LegId("r", 1), request()))
    async with asyncio.timeout(10):
        error = await served.worker.runtime.failed
    assert isinstance(error, RuntimeError)


# ── scores ───────────────────────────────────────────────────────────────────────────────────────


def to_score(length: int) -> Request:
    params = SamplingParams(seed=0, prompt_logprobs=0, n=3, max_tokens=50)
    return Request("", tuple(i % 900 for i in range(length)), params)


async def test_scores_come_beside_the_sessions(served: Served) -> None:
    scores = await fetch_scores(
        replace(served.worker.info, address=served.address), TOKEN, to_score(3000)
    )
    assert len(scores) == 2999
    assert served.worker.is_idle
    assert served.worker.core.pool.num_free == NUM_BLOCKS


@pytest.mark.parametrize(
    ("request_", "cause"),
    [
        (to_score(5000), Cause.CONTEXT_LENGTH_EXCEEDED),
        (replace(to_score(3), sampling=SamplingParams(seed=0)), Cause.PROTOCOL),
    ],
    ids=["long", "nothing asked"],
)
async def test_what_cannot_be_scored_is_refused(
    served: Served, request_: Request, cause: Cause
) -> None:
    info = replace(served.worker.info, address=served.address)
    with pytest.raises(BatonError) as caught:
        await fetch_scores(info, TOKEN, request_)
    assert caught.value.cause is cause


async def test_a_draining_worker_scores_nothing_new(served: Served) -> None:
    served.worker.runtime.drain()
    info = replace(served.worker.info, address=served.address)
    with pytest.raises(BatonError) as caught:
        await fetch_scores(info, TOKEN, to_score(30))
    assert caught.value.cause is Cause.DRAINING


async def test_who_hangs_up_leaves_nothing_behind(served: Served) -> None:
    info = replace(served.worker.info, address=served.address)
    call = asyncio.create_task(fetch_scores(info, TOKEN, to_score(4000)))
    while not served.worker.scores:
        await asyncio.sleep(0.001)
    call.cancel()
    async with asyncio.timeout(10):
        while not (served.worker.is_idle and served.worker.core.pool.num_free == NUM_BLOCKS):
            await asyncio.sleep(0.01)
