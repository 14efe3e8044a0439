"""Pooling workers as the gateway sees them: who is up, how busy, and calls that outlive a worker.

A request goes out in parts, each a call beside the session to the worker with the least to do. A
part whose worker is lost, stuck, draining or full goes to another one. How many parts of one
request are under way is bounded, so that a large one leaves room for others in the workers' queues.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import grpc

from baton.errors import BatonError, Cause
from baton.gateway.backend import ServedModel, WorkerState, WorkerView
from baton.gateway.workers import Fleet, Worker
from baton.messages import StepBatch
from baton.pooling import PoolingInput, PoolingRequest
from baton.rpc import ClusterToken, Connection, connect, to_baton_error
from baton.types import WorkerInfo
from baton.v1 import worker_pb2_grpc
from baton.wire_pooling import pool_reply_from_pb, pool_request_to_pb

log = logging.getLogger(__name__)

MAX_WORKERS_TRIED = 3  # by one part
PART_TOKENS = 4096
PART_INPUTS = 64
PARTS_PER_WORKER = 2  # of one request, on the average
_NUM_PROBE_TOKENS = 4
_PROBE_TIMEOUT_MS = 30_000
_RETRY_S = 1.0
_MAX_RETRY_S = 15.0


@dataclass(slots=True)
class _Member:
    """One incarnation of a worker, with a session."""

    connection: Connection
    lost: asyncio.Event = field(default_factory=asyncio.Event)  # nothing will be answered any more
    num_tokens: int = 0  # sent by this gateway and not answered
    is_proven: bool = False
    probe: asyncio.Task[None] | None = None


class PoolingFleet:
    def __init__(self, token: ClusterToken, max_pending: int) -> None:
        """
        Args:
            max_pending: open requests, beyond which new ones are refused.
        """
        self._token = token
        self._max_pending = max_pending
        self._num_open = 0
        self._fleet = Fleet()
        self._members: dict[str, _Member] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __contains__(self, worker_id: str) -> bool:
        return self._fleet.get(worker_id) is not None

    # ── membership ───────────────────────────────────────────────────────────────────────────────

    def joined(self, info: WorkerInfo) -> None:
        """A session said Hello; an earlier one to the same worker has been reported lost."""
        self._fleet.joined(info)
        member = self._members[info.worker_id] = _Member(connect(info.address, self._token))
        member.probe = asyncio.create_task(self._prove(info, member))

    def received(self, worker_id: str, batch: StepBatch) -> None:
        self._fleet.received(worker_id, batch, time.monotonic() * 1e3)

    def lost(self, worker_id: str) -> None:
        """Its session is gone, and with it the calls."""
        self._fleet.lost(worker_id)
        member = self._members.pop(worker_id, None)
        if member is None:
            return
        member.lost.set()
        if member.probe is not None:
            member.probe.cancel()
        task = asyncio.create_task(member.connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def forget(self, worker_id: str) -> None:
        self._fleet.forget(worker_id)

    async def close(self) -> None:
        """Idempotent."""
        for worker_id in list(self._members):
            self.lost(worker_id)
        await asyncio.gather(*self._closing)

    # ── what it is ───────────────────────────────────────────────────────────────────────────────

    def view(self) -> tuple[WorkerView, ...]:
        return self._fleet.view().workers

    def models(self) -> tuple[ServedModel, ...]:
        """One for each name; where its workers differ, the smallest `max_model_len`."""
        models: dict[str, ServedModel] = {}
        for worker in self._fleet:
            info = worker.info
            if worker.state is not WorkerState.UP:
                continue
            known = models.get(info.model)
            longest = info.max_model_len
            if known is not None:
                longest = min(longest, known.max_model_len)
            models[info.model] = ServedModel(
                info.model, longest, info.vocab_size, info.eos_token_ids, info.pooling
            )
        return tuple(models.values())

    def is_ready(self) -> bool:
        """A worker that is up has answered a tiny request."""
        return any(self._members[worker.worker_id].is_proven for worker in self._able())

    def _able(self) -> Iterator[Worker]:
        return (w for w in self._fleet if w.accepts and w.worker_id in self._members)

    async def _prove(self, info: WorkerInfo, member: _Member) -> None:
        """Until it has worked once."""
        num_tokens = min(_NUM_PROBE_TOKENS, info.max_model_len, info.vocab_size)
        probe = PoolingRequest(
            (PoolingInput(tuple(range(num_tokens))),), deadline_ms=_PROBE_TIMEOUT_MS
        )
        retry_s = _RETRY_S
        while not member.is_proven:
            try:
                await self._call(member, probe)
                member.is_proven = True
                log.info("%s is proven", info.worker_id)
            except BatonError as error:
                log.warning("%s is not proven: %s", info.worker_id, error.message)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _MAX_RETRY_S)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    async def pool(self, model: str, request: PoolingRequest) -> tuple[bytes, ...]:
        """See `Backend.pool`."""
        if self._num_open >= self._max_pending:
            raise BatonError(Cause.OVERLOADED, "too many open requests")
        places = asyncio.Semaphore(PARTS_PER_WORKER * max(1, len(self._members)))

        async def one(part: PoolingRequest) -> tuple[bytes, ...]:
            async with places:
                return await self._pool_part(model, part)

        self._num_open += 1
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(part)) for part in _parts(request)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._num_open -= 1
        return tuple(result for task in tasks for result in task.result())

    async def _pool_part(self, model: str, part: PoolingRequest) -> tuple[bytes, ...]:
        tried: set[str] = set()
        error = BatonError(Cause.NO_WORKER, "no worker is up")
        for _ in range(MAX_WORKERS_TRIED):
            worker_id = self._pick(model, tried)
            if worker_id is None:
                break
            try:
                return await self._call(self._members[worker_id], part)
            except BatonError as failure:
                if not failure.cause.retryable:
                    raise
                log.info("%s: %s; trying another worker", worker_id, failure.message)
                error = failure
                tried.add(worker_id)
        raise error

    def _pick(self, model: str, tried: set[str]) -> str | None:
        able = [
            worker
            for worker in self._able()
            if worker.info.model == model and worker.worker_id not in tried
        ]
        if not able:
            return None
        return min(able, key=self._load).worker_id

    def _load(self, worker: Worker) -> tuple[float, str]:
        """Tokens in its queue, ours at least: its own word of them may be old."""
        own = self._members[worker.worker_id].num_tokens
        return max(own, worker.snapshot.queued_prefill_tokens), worker.worker_id

    async def _call(self, member: _Member, part: PoolingRequest) -> tuple[bytes, ...]:
        """
        Raises:
            BatonError: the worker is lost, refuses, fails, or sends nonsense.
        """
        stub = worker_pb2_grpc.WorkerStub(member.connection.channel)  # type: ignore[no-untyped-call]
        timeout_s = None if part.deadline_ms is None else part.deadline_ms / 1e3
        call = stub.Pool(
            pool_request_to_pb(part), metadata=member.connection.metadata, timeout=timeout_s
        )
        answered = asyncio.ensure_future(_answer(call, len(part.inputs)))
        lost = asyncio.ensure_future(member.lost.wait())
        member.num_tokens += part.num_tokens
        try:
            await asyncio.wait({answered, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise BatonError(Cause.WORKER_LOST, "the worker is gone")
            return answered.result()
        finally:
            member.num_tokens -= part.num_tokens
            lost.cancel()
            if not answered.done():
                call.cancel()
                answered.cancel()
            await asyncio.gather(answered, lost, return_exceptions=True)


async def _answer(
    call: "grpc.aio.UnaryUnaryCall[object, object]", num_inputs: int
) -> tuple[bytes, ...]:
    try:
        return pool_reply_from_pb(await call, num_inputs)  # type: ignore[arg-type]
    except grpc.aio.AioRpcError as error:
        raise to_baton_error(error) from None


def _parts(request: PoolingRequest) -> Iterator[PoolingRequest]:
    """The request cut into calls; an input is never cut."""
    inputs: list[PoolingInput] = []
    num_tokens = 0
    for one in request.inputs:
        size = len(one.token_ids)
        if inputs and (num_tokens + size > PART_TOKENS or len(inputs) == PART_INPUTS):
            yield replace(request, inputs=tuple(inputs))
            inputs, num_tokens = [], 0
        inputs.append(one)
        num_tokens += size
    yield replace(request, inputs=tuple(inputs))
