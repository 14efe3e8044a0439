"""A pooling worker: its desk, and the whole of it over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from baton.config import WorkerConfig
from baton.engine.pooling_core import AbortJob, AddJob, PoolingOutput, PoolingResult
from baton.errors import BatonError, Cause
from baton.failpoints import Failpoints
from baton.messages import Failed, Heartbeat, Hello, StepBatch, Submit
from baton.pooling import PoolingInfo, PoolingInput, PoolingRequest, PoolingTask
from baton.rpc import ClusterToken, Connection, RpcServer, connect, is_serving, to_baton_error
from baton.session_wire import open_session
from baton.types import NO_KV, LegId, Request, Role, SamplingParams, StepTiming, WorkerInfo
from baton.v1 import kv_pb2, kv_pb2_grpc, worker_pb2_grpc
from baton.wire import gateway_message_to_pb, worker_message_from_pb
from baton.wire_pooling import pool_reply_from_pb, pool_request_to_pb
from baton.worker.pooling_desk import MAX_OPEN_INPUTS, PoolingDesk
from baton.worker.pooling_process import PoolingProcess
from tests.conftest import RedisServer
from tests.engine.tiny_pooling import load_runner, pool, save_pooling_model, to_tensor

TIMING = StepTiming(1, duration_ms=1.0)


def info(**pooling: Any) -> WorkerInfo:
    return WorkerInfo(
        worker_id="w",
        incarnation=b"i" * 16,
        role=Role.POOLING,
        model="m",
        fingerprint=b"f" * 32,
        layout=NO_KV,
        address="a:1",
        transports=(),
        host_id="h",
        pid=1,
        device="cpu",
        num_blocks=0,
        max_model_len=8,
        max_num_seqs=4,
        vocab_size=10,
        eos_token_ids=(),
        pooling=PoolingInfo(**{"task": PoolingTask.EMBED, "num_values": 4, **pooling}),
    )


def ask(*inputs: tuple[int, ...], **fields: Any) -> PoolingRequest:
    return PoolingRequest(tuple(PoolingInput(ids) for ids in inputs), **fields)


class Desk:
    """A desk whose engine is played by the test."""

    def __init__(self, **pooling: Any) -> None:
        self.posted: list[AddJob | AbortJob] = []
        self.desk = PoolingDesk(info(**pooling), self.posted.append)

    async def start(self, request: PoolingRequest) -> asyncio.Task[list[bytes]]:
        task = asyncio.create_task(self.desk.pool(request))
        await asyncio.sleep(0)
        return task

    def answer(self, job: int, index: int, value: bytes | Cause) -> None:
        self.desk.on_output(PoolingOutput((PoolingResult(job, index, value),), TIMING))


async def test_results_come_in_the_order_of_the_inputs() -> None:
    desk = Desk()
    task = await desk.start(ask((1, 2), (3,)))
    assert isinstance(desk.posted[0], AddJob)
    load = desk.desk.snapshot(5.0)
    assert (load.num_waiting, load.queued_prefill_tokens, load.step_age_ms) == (2, 3, 5.0)
    desk.answer(0, 1, b"b")
    assert desk.desk.snapshot(0.0).queued_prefill_tokens == 2
    desk.answer(0, 0, b"a")
    assert await task == [b"a", b"b"]
    assert (len(desk.desk), desk.desk.num_inputs, desk.desk.num_tokens) == (0, 0, 0)
    assert len(desk.posted) == 1


async def test_an_end_before_the_end_frees_the_engine() -> None:
    desk = Desk()
    task = await desk.start(ask((1, 2), (3,)))
    desk.answer(0, 0, b"a")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert desk.posted[-1] == AbortJob(0)
    assert (len(desk.desk), desk.desk.num_inputs, desk.desk.num_tokens) == (0, 0, 0)
    desk.answer(0, 1, b"late")
    failing = await desk.start(ask((1,), (2,)))
    desk.answer(1, 0, Cause.NON_FINITE_LOGITS)
    desk.answer(1, 1, Cause.STEP_FAILED)
    with pytest.raises(BatonError) as caught:
        await failing
    assert caught.value.cause is Cause.NON_FINITE_LOGITS
    assert desk.posted[-1] == AbortJob(1)


async def test_a_stuck_engine_gives_up_what_it_has() -> None:
    desk = Desk()
    task = await desk.start(ask((1,)))
    desk.desk.tell_stuck(True)
    for one in (task, await desk.start(ask((1,)))):
        with pytest.raises(BatonError) as caught:
            await one
        assert caught.value.cause is Cause.STEP_FAILED
        assert caught.value.cause.retryable
    assert desk.desk.snapshot(0.0).draining
    desk.desk.tell_stuck(False)
    task = await desk.start(ask((1,)))
    desk.answer(1, 0, b"a")
    assert await task == [b"a"]


@pytest.mark.parametrize(
    ("request_", "cause", "param"),
    [
        (ask((1,) * 9), Cause.CONTEXT_LENGTH_EXCEEDED, "input"),
        (ask(()), Cause.INVALID_REQUEST, "input"),
        (ask((10,)), Cause.INVALID_REQUEST, "input"),
        (ask((1,), dimensions=2), Cause.INVALID_REQUEST, "dimensions"),
        (PoolingRequest((PoolingInput((1,), 1),)), Cause.INVALID_REQUEST, "input"),
    ],
)
async def test_what_the_engine_never_sees(
    request_: PoolingRequest, cause: Cause, param: str
) -> None:
    desk = Desk()
    with pytest.raises(BatonError) as caught:
        await desk.desk.pool(request_)
    assert (caught.value.cause, caught.value.param) == (cause, param)
    assert not desk.posted


async def test_it_is_bounded_and_drains() -> None:
    desk = Desk()
    first = await desk.start(ask(*[(1,)] * MAX_OPEN_INPUTS))
    with pytest.raises(BatonError) as caught:
        await desk.desk.pool(ask((1,)))
    assert caught.value.cause is Cause.OVERLOADED
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    desk.desk.is_draining = True
    with pytest.raises(BatonError) as caught:
        await desk.desk.pool(ask((1,)))
    assert caught.value.cause is Cause.DRAINING


# ── the whole of it ──────────────────────────────────────────────────────────────────────────────


class Running:
    def __init__(
        self,
        process: PoolingProcess,
        failpoints: Failpoints,
        connection: Connection,
        address: str,
    ) -> None:
        self.process = process
        self.failpoints = failpoints
        self.connection = connection
        self.address = address

    async def pool(self, request: PoolingRequest) -> tuple[bytes, ...]:
        stub = worker_pb2_grpc.WorkerStub(self.connection.channel)  # type: ignore[no-untyped-call]
        try:
            reply = await stub.Pool(pool_request_to_pb(request))
        except grpc.aio.AioRpcError as error:
            raise to_baton_error(error) from None
        return pool_reply_from_pb(reply, len(request.inputs))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_pooling_model(tmp_path, "bert", pooling="mean", normalizes=True)


@pytest.fixture
async def running(model: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    server = RpcServer(ClusterToken())
    port = server.bind("127.0.0.1", 0)
    config = WorkerConfig(model=str(model), max_num_batched_tokens=64)
    failpoints = Failpoints(["pool:+1=error", "pooled:+1=error"])
    process = PoolingProcess(config, failpoints, load_runner(model), server, port)
    await process.start(ClusterToken(), redis_server.url)
    address = f"127.0.0.1:{port}"
    connection = connect(address, ClusterToken())
    yield Running(process, failpoints, connection, address)
    await connection.close()
    await process.close()


async def test_it_serves_over_grpc(running: Running, model: Path) -> None:
    inputs = [(5, 6, 7), (8,), tuple(range(70))]
    results = await running.pool(ask(*inputs, use_activation=False))
    expected = pool(load_runner(model), *map(list, inputs), use_activation=False)
    for ours, theirs in zip(map(to_tensor, results), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(BatonError) as caught:
        await running.pool(ask((5000,)))
    assert caught.value.cause is Cause.INVALID_REQUEST
    many = await asyncio.gather(*(running.pool(ask((i, i + 1))) for i in range(50)))
    assert len({result for (result,) in many}) == 50


async def test_an_injected_error_leaves_the_request_to_another_worker(running: Running) -> None:
    for _ in range(2):
        running.failpoints.count()
        with pytest.raises(BatonError) as caught:
            await running.pool(ask((1,)))
        assert caught.value.cause.retryable
        assert caught.value.cause.http_status == 503
    assert await running.pool(ask((1,)))


async def test_its_session_carries_load_and_refuses_legs(running: Running) -> None:
    call = open_session(running.connection)
    hello = worker_message_from_pb(await call.read())
    assert isinstance(hello, Hello)
    assert hello.info.role is Role.POOLING
    assert hello.info.pooling == PoolingInfo(PoolingTask.EMBED, 48)
    assert hello.info.capabilities == {"embed"}
    await call.write(gateway_message_to_pb(Heartbeat(3)))
    beat = worker_message_from_pb(await call.read())
    assert isinstance(beat, StepBatch)
    assert (beat.heartbeat_seq, beat.snapshot.role) == (3, Role.POOLING)
    leg = LegId("r", 1)
    request = Request("r", (1,), SamplingParams(seed=1, max_tokens=1))
    await call.write(gateway_message_to_pb(Submit(leg, request)))
    refused = worker_message_from_pb(await call.read())
    assert isinstance(refused, StepBatch)
    (failed,) = refused.messages
    assert isinstance(failed, Failed)
    assert (failed.leg, failed.cause) == (leg, Cause.UNSUPPORTED)
    stub = kv_pb2_grpc.KVStub(running.connection.channel)  # type: ignore[no-untyped-call]
    inventory = [reply async for reply in stub.Inventory(kv_pb2.InventoryRequest())]
    assert [list(reply.hashes) for reply in inventory] == [[]]
    call.cancel()


async def test_health_and_drain(running: Running) -> None:
    async with asyncio.timeout(20):
        while not await is_serving(running.address):
            await asyncio.sleep(0.05)
        await running.process.drain(5.0)
    with pytest.raises(BatonError) as caught:
        await running.pool(ask((1,)))
    assert caught.value.cause is Cause.DRAINING
