"""Responses that nobody waits for: they run here, and are read from the store, here or anywhere.

A run tells the store that it is there every second, and hears in the same call what shall be
cancelled; so any gateway can serve, cancel or give up any response.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial

from pydantic_core import to_json

from baton.errors import BatonError, Cause
from baton.gateway.accounting import OK, outcome_of
from baton.gateway.errors import api_error
from baton.gateway.generation import Generation
from baton.gateway.responses.events import TERMINAL, Event
from baton.gateway.responses.items import Chat
from baton.gateway.responses.shape import ResponsesShape
from baton.gateway.responses.store import ResponseStore, StoredResponse, StoreUnavailable

log = logging.getLogger(__name__)

_BEAT_S = 1.0
_GIVE_UP_S = 60.0  # without Redis
_TOO_LARGE = BatonError(Cause.INVALID_REQUEST, "The answer is larger than what may be stored.")
_NO_ROOM = {"code": "server_error", "message": _TOO_LARGE.message}


@dataclass(eq=False)
class Run:
    """One response under way. Its events wait here until the store has them."""

    tenant: str
    generation: Generation
    shape: ResponsesShape
    messages: Chat
    num_bytes: int = 0
    waiting: list[bytes] = field(default_factory=list)
    more: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.shape.id

    def add(self, events: list[Event]) -> None:
        texts = [to_json(event) for event in events]
        self.num_bytes += sum(map(len, texts))
        self.waiting += texts
        self.more.set()


class Background:
    """The runs of this gateway. `close` waits for them; they end by themselves, or by
    `InFlight.fail_all`."""

    def __init__(self, store: ResponseStore, max_runs: int) -> None:
        self._store = store
        self._max_runs = max_runs
        self._name = uuid.uuid4().hex
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._beating: asyncio.Task[None] | None = None
        self._is_closing = False

    @property
    def is_full(self) -> bool:
        return len(self._runs) >= self._max_runs

    async def start(self, run: Run) -> bool:
        """Owns its generation from here on. False: it is too large to be stored.

        Raises:
            StoreUnavailable
        """
        self._runs[run.id] = run
        run.add(run.shape.writer.queued())
        first, run.waiting = run.waiting, []
        kept = False
        try:
            await self._store.beat(self._name, ())
            stored = StoredResponse(run.shape.response, run.messages, self._name)
            kept = await self._store.put(run.tenant, stored, events=first)
        finally:
            if not kept:
                del self._runs[run.id]
                run.generation.close()
        if kept:
            self._spawn(self._serve(run))
            if self._beating is None or self._beating.done():
                self._beating = asyncio.create_task(self._beat())
        return kept

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, response_id: str) -> bool:
        """False: it does not run here."""
        run = self._runs.get(response_id)
        if run is not None:
            run.generation.abort()
        return run is not None

    async def is_lost(self, stored: StoredResponse) -> bool:
        """It is not over, and nobody runs it.

        Raises:
            StoreUnavailable
        """
        if stored.response["status"] in TERMINAL or stored.response["id"] in self._runs:
            return False
        return stored.gateway == self._name or not await self._store.is_running(stored.gateway)

    async def close(self) -> None:
        self._is_closing = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    async def _beat(self) -> None:
        while self._runs:
            running = [(run.tenant, run.id) for run in self._runs.values()]
            with suppress(StoreUnavailable):
                for response_id in await self._store.beat(self._name, running):
                    self.cancel(response_id)
            await asyncio.sleep(_BEAT_S)

    # ── one run ──────────────────────────────────────────────────────────────────────────────────

    async def _serve(self, run: Run) -> None:
        writing = asyncio.create_task(self._write(run))
        try:
            await self._generate(run)
        finally:
            run.generation.close()
        try:
            await writing  # ends with the last event
        except StoreUnavailable:
            log.warning("%s is lost: the store was away for too long", run.id)
        finally:
            del self._runs[run.id]

    async def _generate(self, run: Run) -> None:
        generation, shape = run.generation, run.shape
        try:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    run.add(list(shape.chunks(delta, generation.usage())))
                    if delta.first:
                        generation.first_byte()
                    if run.num_bytes > self._store.max_item_bytes // 2:
                        generation.fail(_TOO_LARGE)
        except Exception as error:
            generation.record.outcome = outcome_of(error)
            if not isinstance(error, BatonError):
                log.error("%s failed", run.id, exc_info=error)
            run.add([*shape.failure(api_error(error, generation.job.id))])
            return
        if generation.aborted:
            run.add(shape.cancelled(generation.usage()))
        else:
            generation.record.outcome = OK
            run.add(list(shape.last_chunks(generation.usage())))

    async def _write(self, run: Run) -> None:
        """Events to the store, until the last one is there.

        Raises:
            StoreUnavailable: for too long.
        """
        shown = "queued"
        while True:
            await run.more.wait()
            run.more.clear()
            events, run.waiting = run.waiting, []
            status = run.shape.response["status"]
            if status != shown:  # before the events: who has seen the last one finds it over
                shown = status
                await self._insist(partial(self._put, run))
            if events:
                await self._insist(partial(self._store.add_events, run.tenant, run.id, events))
            if status in TERMINAL:
                return

    async def _put(self, run: Run) -> None:
        stored = StoredResponse(run.shape.response, run.messages, self._name)
        size = run.num_bytes
        if not await self._store.put(run.tenant, stored, num_event_bytes=size, known=True):
            # Deleted; or too large, and then this is what is left of it.
            stub = {**run.shape.response, "output": [], "status": "failed", "error": _NO_ROOM}
            stored = StoredResponse(stub, [], self._name)
            await self._store.put(run.tenant, stored, known=True)

    async def _insist(self, call: Callable[[], Awaitable[None]]) -> None:
        """
        Raises:
            StoreUnavailable: for too long, or at the end of this process.
        """
        deadline_s = time.monotonic() + _GIVE_UP_S
        while True:
            try:
                return await call()
            except StoreUnavailable:
                if self._is_closing or time.monotonic() > deadline_s:
                    raise
            await asyncio.sleep(_BEAT_S)
