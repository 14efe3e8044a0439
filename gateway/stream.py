"""Answers on the wire: server-sent events, or one JSON body; and what happens when the client goes.

A client that disconnects ends its request at once, in every phase. Until the first token nothing is
sent, so that a failure is a plain status; except that a stream which stays silent for
`--sse-keep-alive-interval` is opened with a comment. After that a failure is an `error` event, and
the stream ends without `[DONE]`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError
from baton.gateway.accounting import OK, outcome_of
from baton.gateway.choice import Delta, joined
from baton.gateway.errors import ApiError, api_error
from baton.gateway.events import COMMENT, DONE, event
from baton.gateway.generation import Generation, Usage
from baton.settings import LimitSettings

log = logging.getLogger(__name__)

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
_WRITES_PER_TURN = 32  # a stream with many tokens waiting lets the others in between


@dataclass(frozen=True, slots=True)
class Streaming:
    """How an answer is to be streamed."""

    include_usage: bool = False  # in last chunks of their own
    continuous_usage: bool = False  # in every chunk
    interval: int = 1  # tokens in one chunk, at least; the first of a choice goes at once
    named_events: bool = False  # each named after its "type", and no [DONE] behind the last
    failure: Callable[[ApiError], Sequence[dict[str, Any]]] | None = None  # the events that tell it


class Shape(Protocol):
    """How one endpoint writes down what happened."""

    def chunks(self, delta: Delta, usage: Usage | None) -> Sequence[dict[str, Any] | bytes]:
        """The events of one delta, some perhaps as they are sent; `usage` if every event shall
        carry it."""
        ...

    def last_chunks(self, usage: Usage) -> Sequence[dict[str, Any]]:
        """What follows the last delta."""
        ...

    def answer(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed; `choices` in order of their index."""
        ...


class EventWriter:
    """Server-sent events over ASGI. The response starts with the first write.

    Two tasks write: the stream and its `watch`, which does so only while the stream is silent.
    """

    def __init__(
        self, scope: Scope, send: Send, limits: LimitSettings, *, named: bool = False
    ) -> None:
        self.started = False
        self._named = named
        self._send = send
        self._send_more: Send = scope["state"]["send_more"]
        self._comment = asyncio.Lock()  # held while one is written: the stream waits for its end
        self._limits = limits
        self._last_write_s = time.monotonic()
        self._blocked_since_s: float | None = None  # a write waits for the client to read
        self._num_writes = 0

    async def events(self, values: Sequence[dict[str, Any] | bytes]) -> None:
        """In one write."""
        if not values:
            return
        if self._comment.locked():
            await self._until_written()
        parts = [v if isinstance(v, bytes) else event(v, named=self._named) for v in values]
        await self._put(b"".join(parts), more=True)
        self._num_writes += 1
        if self._num_writes % _WRITES_PER_TURN == 0:
            await asyncio.sleep(0)

    async def end(self, last: bytes = b"") -> None:
        if self._comment.locked():
            await self._until_written()
        await self._put(last, more=False)

    async def _until_written(self) -> None:
        async with self._comment:
            pass

    async def _put(self, data: bytes, *, more: bool) -> None:
        self._last_write_s = self._blocked_since_s = time.monotonic()
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        send = self._send_more if more else self._send
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._blocked_since_s = None

    async def watch(self, patience: asyncio.Timeout) -> None:
        """Runs beside the stream: a comment after every `sse_keep_alive_interval` of silence, and
        the end of `patience` when the client has not read for `slow_client_timeout_s`. One timer
        for a whole stream costs less than one for each write."""
        interval_s = self._limits.sse_keep_alive_interval or float("inf")
        limit_s = self._limits.slow_client_timeout_s
        try:
            while True:
                now = time.monotonic()
                if self._blocked_since_s is not None:
                    left_s = self._blocked_since_s + limit_s - now
                    if left_s <= 0:
                        raise TimeoutError
                else:
                    left_s = self._last_write_s + interval_s - now
                    if left_s <= 0:
                        async with asyncio.timeout(limit_s), self._comment:
                            await self._put(COMMENT, more=True)
                        continue
                await asyncio.sleep(min(left_s, limit_s / 4))
        except TimeoutError:
            patience.reschedule(asyncio.get_running_loop().time())


class GenerationResponse(Response):
    """Runs a generation and answers with it. Owns it: it is closed however this ends."""

    def __init__(
        self,
        generation: Generation,
        shape: Shape,
        limits: LimitSettings,
        *,
        streaming: Streaming | None = None,
        before_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """
        Args:
            streaming: without it, one JSON body.
            before_end: awaited when the shape has the whole answer, and the client not yet.
        """
        super().__init__()
        self._before_end = before_end
        self._generation = generation
        self._shape = shape
        self._limits = limits
        self._streaming = streaming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self._streaming is not None:
                await self._send_events(self._streaming, scope, send)
            else:
                await self._send_answer(scope, receive, send)
        except Exception as error:
            self._generation.record.outcome = outcome_of(error)
            raise
        finally:
            self._generation.close()
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.abort()

    async def _send_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        choices: dict[int, list[Delta]] = {}
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                generation.first_byte()
                choices.setdefault(delta.index, []).append(delta)
        if generation.aborted:
            return
        in_order = [choices[index] for index in sorted(choices)]
        generation.record.outcome = OK

        def shaped() -> dict[str, Any]:
            return self._shape.answer(in_order, generation.usage())

        is_bulk = generation.job.sampling.prompt_logprobs is not None
        answer = await asyncio.to_thread(shaped) if is_bulk else shaped()
        if self._before_end is not None:
            await self._before_end()
        body = await asyncio.to_thread(to_json, answer) if is_bulk else to_json(answer)
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _send_events(self, how: Streaming, scope: Scope, send: Send) -> None:
        writer = EventWriter(scope, send, self._limits, named=how.named_events)
        try:
            async with asyncio.timeout(None) as patience:
                beside = asyncio.create_task(writer.watch(patience))
                try:
                    await self._write_deltas(how, writer)
                    # Before the loop turns: who has read the end finds it counted.
                    self._generation.close()
                except Exception as error:
                    if not writer.started:
                        raise
                    await self._write_error(how, writer, error, scope["state"]["request_id"])
                finally:
                    beside.cancel()
                    await asyncio.gather(beside, return_exceptions=True)
        except TimeoutError:
            if not patience.expired():
                raise
            # Returning without an end makes the server close the connection.
            log.info("%s: the client stopped reading", self._generation.job.id)

    async def _write_error(
        self, how: Streaming, writer: EventWriter, error: Exception, request_id: str
    ) -> None:
        self._generation.record.outcome = outcome_of(error)
        if not isinstance(error, BatonError):
            log.error("%s failed", self._generation.job.id, exc_info=error)
        told = api_error(error, request_id)
        kind = {"type": "error"} if how.named_events else {}
        events = [{**kind, **told.body()}] if how.failure is None else how.failure(told)
        await writer.events(events)
        await writer.end()

    async def _write_deltas(self, how: Streaming, writer: EventWriter) -> None:
        generation = self._generation
        async with aclosing(generation.deltas()) as deltas:
            async for delta in _spaced(deltas, how.interval) if how.interval > 1 else deltas:
                usage = generation.usage() if how.continuous_usage else None
                await writer.events(self._shape.chunks(delta, usage))
                if delta.first:
                    generation.first_byte()
        if generation.aborted:
            return
        if how.include_usage or how.named_events:
            last = self._shape.last_chunks(generation.usage())
            if self._before_end is not None:
                await self._before_end()
            await writer.events(last)
        await writer.end(b"" if how.named_events else DONE)
        generation.record.outcome = OK


async def _spaced(deltas: AsyncIterator[Delta], interval: int) -> AsyncIterator[Delta]:
    """Deltas of at least `interval` tokens, but for the first and the last of a choice."""
    held: dict[int, list[Delta]] = {}
    async for delta in deltas:
        mine = held.setdefault(delta.index, [])
        mine.append(delta)
        num_tokens = sum(len(part.token_ids) for part in mine)
        if delta.first or delta.finish_reason is not None or num_tokens >= interval:
            del held[delta.index]
            yield joined(mine)
