"""Log-probabilities of a prompt, fetched from a worker in bulk, beside its session."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

import grpc

from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.backend import Backend
from baton.gateway.workers import Worker
from baton.rpc import ClusterToken, connect, to_baton_error
from baton.types import Logprobs, Request, WorkerInfo
from baton.v1 import worker_pb2_grpc
from baton.wire import score_reply_from_pb, score_request_to_pb

MAX_WORKERS_TRIED = 3
MAX_ENTRIES = 1 << 20  # of one job: prompt tokens × n × (prompt_logprobs + 1)
PROMPTS_AT_ONCE = 8  # of one job

Fetch = Callable[[WorkerInfo, Request], Awaitable[tuple[Logprobs, ...]]]


async def fetch_scores(
    info: WorkerInfo, token: ClusterToken, request: Request
) -> tuple[Logprobs, ...]:
    """Of prompt tokens 1, 2, … (the first has none); as many alternatives as the request's
    `prompt_logprobs` says.

    Raises:
        BatonError: the worker cannot be reached, refuses, fails, or sends nonsense.
    """
    connection = connect(info.address, token)
    scores: list[Logprobs] = []
    deadline_s = None if request.deadline_ms is None else request.deadline_ms / 1e3
    try:
        stub = worker_pb2_grpc.WorkerStub(connection.channel)  # type: ignore[no-untyped-call]
        message = score_request_to_pb(request)
        async for reply in stub.Score(message, metadata=connection.metadata, timeout=deadline_s):
            start, logprobs = score_reply_from_pb(reply)
            if start != len(scores) + 1:
                raise BatonError(Cause.PROTOCOL, "scores out of order")
            scores += logprobs
    except grpc.aio.AioRpcError as error:
        raise to_baton_error(error) from None
    finally:
        await connection.close()
    if len(scores) != len(request.prompt_token_ids) - 1:
        raise BatonError(Cause.PROTOCOL, "scores do not cover the prompt")
    return tuple(scores)


class PromptScores:
    """Of all prompts of one job."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._places = asyncio.Semaphore(PROMPTS_AT_ONCE)
        self._tasks: list[asyncio.Task[tuple[Logprobs, ...]]] = []

    async def fetch(self, requests: Sequence[Request]) -> list[tuple[Logprobs, ...]]:
        """In the order of the requests.

        Raises:
            InvalidRequest: it would be too much; param `prompt_logprobs`.
            BatonError: as `Backend.score`.
            CancelledError: `cancel` was called.
        """
        num_top = requests[0].sampling.prompt_logprobs or 0
        # Every choice of an answer repeats them.
        num_tokens = sum(len(r.prompt_token_ids) * r.sampling.n for r in requests)
        if num_tokens * (num_top + 1) > MAX_ENTRIES:
            message = f"Prompt tokens × n × (prompt_logprobs + 1) must not exceed {MAX_ENTRIES}."
            raise InvalidRequest(message, "prompt_logprobs")
        self._tasks = [asyncio.create_task(self._fetch_one(request)) for request in requests]
        try:
            return await asyncio.gather(*self._tasks)
        finally:
            self.cancel()

    async def _fetch_one(self, request: Request) -> tuple[Logprobs, ...]:
        async with self._places:
            return await self._backend.score(request)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


async def score(workers: Iterable[Worker], request: Request, fetch: Fetch) -> tuple[Logprobs, ...]:
    """From a worker that prefills, the least busy first; another one where that helps.

    Raises:
        BatonError: NO_WORKER, or what the last one said.
    """
    able = [worker for worker in workers if worker.accepts]
    able.sort(key=lambda worker: (not worker.role.can_prefill, worker.queued_tokens))
    error = BatonError(Cause.NO_WORKER, "no worker is up")
    for worker in able[:MAX_WORKERS_TRIED]:
        try:
            return await fetch(worker.info, request)
        except BatonError as failure:
            error = failure
            if not failure.cause.retryable:
                break
    raise error
