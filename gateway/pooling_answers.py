"""The life of one request for embeddings or scores: counted, ended when its client goes, answered
with one JSON body."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError
from baton.gateway.accounting import CANCELLED, OK, outcome_of
from baton.gateway.context import Context
from baton.gateway.pooling_fields import PoolingFields
from baton.pooling import PoolingInput, PoolingRequest

log = logging.getLogger(__name__)


class PoolingRecord:
    """What one request took; told to the metrics, and in one log line."""

    def __init__(self, context: Context, endpoint: str, model: str, request: Request) -> None:
        self.outcome = CANCELLED
        self._metrics = context.metrics
        self._endpoint = endpoint
        self._model = model
        self._id = request.state.request_id
        self._span = context.begin_span(request.headers.get("traceparent"), endpoint)
        self._started_s = time.monotonic()
        self._num_inputs = self._num_tokens = 0
        self._metrics.requests_open.inc()

    def opened(self, num_inputs: int, num_tokens: int) -> None:
        """Tokenized and valid."""
        self._num_inputs += num_inputs
        self._num_tokens += num_tokens
        self._metrics.prompt_tokens.inc(num_tokens)

    def close(self) -> None:
        metrics, took_s = self._metrics, time.monotonic() - self._started_s
        metrics.requests_open.dec()
        metrics.requests.labels(self._endpoint, self.outcome).inc()
        metrics.e2e_s.observe(took_s)
        if metrics.vllm is not None and self._num_inputs:
            reason = {OK: "stop", CANCELLED: "abort"}.get(self.outcome, "error")
            metrics.vllm.pooled(self._model, self._num_tokens, took_s, reason)
        if self._span is not None:
            self._span.set(outcome=self.outcome, prompt_tokens=self._num_tokens)
            self._span.end("" if self.outcome in (OK, CANCELLED) else self.outcome)
        log.info(
            "%s %s (%s), %d inputs, %d tokens, total %.1f ms",
            self._endpoint,
            self.outcome,
            self._id,
            self._num_inputs,
            self._num_tokens,
            took_s * 1e3,
        )


class Pooling:
    """What the work of one request needs: asks the fleet, and counts."""

    def __init__(
        self, context: Context, body: PoolingFields, model: str, record: PoolingRecord
    ) -> None:
        self._context = context
        self._body = body
        self._model = model
        self._record = record
        self.num_tokens = 0

    async def results(
        self, inputs: tuple[PoolingInput, ...], dimensions: int | None = None
    ) -> tuple[bytes, ...]:
        """See `Backend.pool`."""
        request = PoolingRequest(
            inputs,
            self._body.use_activation,
            dimensions,
            self._body.priority,
            int(self._context.settings.request_timeout_s * 1e3),
        )
        self.num_tokens = request.num_tokens
        self._record.opened(len(inputs), self.num_tokens)
        return await self._context.backend.pool(self._model, request)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_tokens,
            "total_tokens": self.num_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        }


Work = Callable[[Pooling], Awaitable[Callable[[], dict[str, Any]]]]


class PoolingAnswer(Response):
    """Does the work and answers with what it gives, which is rendered off the event loop. An
    `Answer` of `InFlight`."""

    def __init__(
        self,
        context: Context,
        body: PoolingFields,
        model: str,
        request: Request,
        endpoint: str,
        work: Work,
    ) -> None:
        super().__init__()
        self._context = context
        self._record = PoolingRecord(context, endpoint, model, request)
        self._pooling = Pooling(context, body, model, self._record)
        self._work = work
        self._failure: BatonError | None = None
        self._task: asyncio.Task[bytes] | None = None
        context.inflight.begin(self)

    def fail(self, error: BatonError) -> None:
        self._failure = error
        if self._task is not None:
            self._task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._task = task = asyncio.create_task(self._run())
        watcher = asyncio.create_task(_watch(receive, task))
        try:
            await asyncio.wait({task})
            if self._failure is not None:
                raise self._failure
            if task.cancelled():
                return  # the client is gone
            answer = Response(task.result(), media_type="application/json")
            self._record.outcome = OK
            await answer(scope, receive, send)
        except Exception as error:
            self._record.outcome = outcome_of(error)
            raise
        finally:
            watcher.cancel()
            task.cancel()
            self._record.close()
            self._context.inflight.end(self, time.monotonic())

    async def _run(self) -> bytes:
        render = await self._work(self._pooling)
        return await asyncio.to_thread(lambda: to_json(render()))


async def _watch(receive: Receive, task: asyncio.Task[bytes]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
