"""Calls to pooling workers, played over real gRPC: who is asked, and what a loss means."""

import asyncio
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from baton.config import GatewayConfig
from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.backend import WorkerState
from baton.gateway.orchestrate import Orchestrator
from baton.gateway.pooling_fleet import PART_INPUTS, PARTS_PER_WORKER
from baton.messages import Heartbeat, Hello, StepBatch
from baton.pooling import PoolingInfo, PoolingInput, PoolingRequest, PoolingTask
from baton.rpc import ClusterToken, RpcServer
from baton.session_wire import SERVICE, serve_sessions
from baton.types import NO_KV, Role, WorkerInfo, WorkerSnapshot
from baton.v1 import worker_pb2
from baton.wire import gateway_message_from_pb, worker_message_to_pb
from baton.wire_pooling import pool_reply_to_pb, pool_request_from_pb
from tests.gateway.support import worker_info
from tests.gateway.test_orchestrate import FAST, until

PROBE = tuple(range(4))


class Pooler:
    """Its results are the inputs' first ids. `hold`: calls wait for it."""

    def __init__(self, worker_id: str) -> None:
        self.info: WorkerInfo = replace(
            worker_info(worker_id, Role.POOLING),
            layout=NO_KV,
            pooling=PoolingInfo(PoolingTask.EMBED, 1),
            vocab_size=2**20,
        )
        self.asked: list[PoolingRequest] = []
        self.error: BatonError | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.num_running = self.most_running = 0
        self.queued_tokens = 0
        self.is_silent = False
        self._server: RpcServer | None = None

    async def start(self) -> None:
        server = self._server = RpcServer(ClusterToken())
        serve_sessions(server.grpc, self.session)
        pool = grpc.unary_unary_rpc_method_handler(
            self.pool, worker_pb2.PoolRequest.FromString, worker_pb2.PoolReply.SerializeToString
        )
        handler = grpc.method_handlers_generic_handler(SERVICE, {"Pool": pool})
        server.grpc.add_generic_rpc_handlers((handler,))
        port = server.bind("127.0.0.1", 0)
        self.info = replace(self.info, address=f"127.0.0.1:{port}")
        await server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace_s=0)
            self._server = None

    async def pool(self, message: Any, context: Any) -> Any:
        request = pool_request_from_pb(message)
        if request.inputs[0].token_ids != PROBE:
            self.asked.append(request)
        if self.error is not None:
            raise self.error
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await self.hold.wait()
        finally:
            self.num_running -= 1
        return pool_reply_to_pb([struct.pack("<f", one.token_ids[0]) for one in request.inputs])

    async def session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        yield worker_message_to_pb(Hello(self.info))
        async for raw in requests:
            message = gateway_message_from_pb(raw)
            if isinstance(message, Heartbeat) and not self.is_silent:
                load = WorkerSnapshot(Role.POOLING, queued_prefill_tokens=self.queued_tokens)
                yield worker_message_to_pb(StepBatch((), load, heartbeat_seq=message.seq))


class Fleet:
    def __init__(self) -> None:
        config = GatewayConfig.model_validate(
            {"redis_url": "unix:///nonexistent/redis.sock", "max_pending_requests": 3}
        )
        self.orchestrator = Orchestrator(config, FAST)
        self.workers: dict[str, Pooler] = {}

    async def add(self, worker_id: str) -> Pooler:
        worker = self.workers[worker_id] = Pooler(worker_id)
        await worker.start()
        self.orchestrator._discovery.members[worker_id] = worker.info
        self.orchestrator.worker_registered(worker.info)
        await until(lambda: self.state(worker_id) is WorkerState.UP)
        return worker

    def state(self, worker_id: str) -> WorkerState:
        view = self.orchestrator.topology()
        return next(worker.state for worker in view.workers if worker.worker_id == worker_id)

    async def pool(self, *ids: int, **fields: Any) -> list[int]:
        inputs = tuple(PoolingInput((one,)) for one in ids)
        results = await self.orchestrator.pool("tiny", PoolingRequest(inputs, **fields))
        return [int(struct.unpack("<f", result)[0]) for result in results]


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.orchestrator.close()
    await asyncio.gather(*(worker.stop() for worker in fleet.workers.values()))
    await until(lambda: not _leftover())  # a worker's last answer may end a turn later


def _leftover() -> list[str]:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return [repr(task) for task in tasks if "grpc" not in repr(task)]


async def test_a_worker_is_proven_by_a_tiny_request(fleet: Fleet) -> None:
    assert not fleet.orchestrator.ready()
    worker = await fleet.add("w0")
    await until(fleet.orchestrator.ready)
    (model,) = fleet.orchestrator.models()
    assert (model.name, model.pooling) == ("tiny", worker.info.pooling)
    fleet.orchestrator.drain()
    assert not fleet.orchestrator.ready()
    with pytest.raises(BatonError) as caught:
        await fleet.pool(1)
    assert caught.value.cause is Cause.DRAINING


async def test_a_large_request_goes_out_in_parts_and_comes_back_in_order(fleet: Fleet) -> None:
    first, second = await fleet.add("w0"), await fleet.add("w1")
    ids = list(range(10, 10 + 10 * PART_INPUTS + 5))
    assert await fleet.pool(*ids, use_activation=False, priority=7) == ids
    assert first.asked
    assert second.asked
    parts = first.asked + second.asked
    assert len(parts) == 11
    assert {(part.use_activation, part.priority) for part in parts} == {(False, 7)}
    assert max(len(part.inputs) for part in parts) == PART_INPUTS
    assert first.most_running + second.most_running <= 2 * PARTS_PER_WORKER


async def test_the_least_busy_is_asked(fleet: Fleet) -> None:
    first, second = await fleet.add("w0"), await fleet.add("w1")
    first.queued_tokens = 100
    await until(lambda: all(w.snapshot.queued_prefill_tokens in (0, 100) for w in _views(fleet)))
    await until(lambda: any(w.snapshot.queued_prefill_tokens for w in _views(fleet)))
    for _ in range(3):
        await fleet.pool(5)
    assert (len(first.asked), len(second.asked)) == (0, 3)


def _views(fleet: Fleet) -> Any:
    return fleet.orchestrator.topology().workers


@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_a_lost_workers_parts_are_done_by_another(fleet: Fleet, how: str) -> None:
    first = await fleet.add("w0")
    await until(fleet.orchestrator.ready)
    first.hold.clear()
    asking = asyncio.create_task(fleet.pool(5, 6))
    await until(lambda: bool(first.asked))
    second = await fleet.add("w1")
    if how == "killed":
        await first.stop()
    else:
        first.is_silent = True
    assert await asking == [5, 6]
    assert len(second.asked) == 1


async def test_what_one_refuses_another_tries(fleet: Fleet) -> None:
    first = await fleet.add("w0")
    await until(fleet.orchestrator.ready)
    second = await fleet.add("w1")
    first.error = BatonError(Cause.OVERLOADED, "full")
    second.queued_tokens = 50
    await until(lambda: any(w.snapshot.queued_prefill_tokens for w in _views(fleet)))
    assert await fleet.pool(5) == [5]
    assert len(first.asked) == len(second.asked) == 1
    first.error = InvalidRequest("no", "input")
    with pytest.raises(BatonError) as caught:
        await fleet.pool(5)
    assert caught.value.cause is Cause.INVALID_REQUEST
    assert len(second.asked) == 1
    first.error = second.error = BatonError(Cause.STEP_FAILED, "broken")
    with pytest.raises(BatonError) as caught:
        await fleet.pool(5)
    assert caught.value.cause is Cause.STEP_FAILED


async def test_without_a_worker(fleet: Fleet) -> None:
    with pytest.raises(BatonError) as caught:
        await fleet.pool(5)
    assert caught.value.cause is Cause.NO_WORKER


async def test_cancelling_reaches_the_worker(fleet: Fleet) -> None:
    worker = await fleet.add("w0")
    await until(fleet.orchestrator.ready)
    worker.hold.clear()
    asking = [asyncio.create_task(fleet.pool(5)) for _ in range(3)]
    await until(lambda: worker.num_running == 3)
    with pytest.raises(BatonError) as caught:
        await fleet.pool(6)
    assert caught.value.cause is Cause.OVERLOADED
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await until(lambda: worker.num_running == 0)
    worker.hold.set()
    assert await fleet.pool(7) == [7]


async def test_a_deadline(fleet: Fleet) -> None:
    worker = await fleet.add("w0")
    await until(fleet.orchestrator.ready)
    worker.hold.clear()
    with pytest.raises(BatonError) as caught:
        await fleet.pool(5, deadline_ms=100)
    assert caught.value.cause is Cause.DEADLINE_EXCEEDED


async def test_what_left_is_forgotten(fleet: Fleet) -> None:
    worker = await fleet.add("w0")
    del fleet.orchestrator._discovery.members["w0"]  # before the loss, which may be told at once
    await worker.stop()
    await until(lambda: not _views(fleet))
    assert not fleet.orchestrator.models()
