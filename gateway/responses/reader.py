"""The events of a response that runs, or ran, in the background, from the store."""

import asyncio
import json
import logging
from typing import Any

from fastapi import Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError
from baton.gateway.errors import api_error
from baton.gateway.responses.events import TERMINAL, is_last
from baton.gateway.responses.service import ResponseService
from baton.gateway.stream import EventWriter
from baton.settings import LimitSettings

log = logging.getLogger(__name__)


class EventsResponse(Response):
    """Ends with the last event. A client that leaves ends nothing but its own reading."""

    def __init__(
        self,
        service: ResponseService,
        limits: LimitSettings,
        tenant: str,
        response_id: str,
        starting_after: int | None = None,
    ) -> None:
        """`starting_after`: the number of the last event that the client has."""
        super().__init__()
        self._service = service
        self._limits = limits
        self._tenant = tenant
        self._id = response_id
        self._last = -1 if starting_after is None else starting_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = EventWriter(scope, send, self._limits, named=True)
        reading = asyncio.create_task(self._read(writer))
        gone = asyncio.create_task(_disconnect(receive))
        tasks = [reading, gone]
        try:
            async with asyncio.timeout(None) as patience:
                tasks.append(asyncio.create_task(writer.watch(patience)))
                await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    await self._end(writer, reading.exception(), scope["state"]["request_id"])
        except TimeoutError:
            if not patience.expired():
                raise
            log.info("%s: the client stopped reading", self._id)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self, writer: EventWriter, error: BaseException | None, request_id: str) -> None:
        if error is not None:
            if not writer.started:
                raise error
            if not isinstance(error, BatonError | HTTPException):
                log.error("%s could not be read", self._id, exc_info=error)
            told = api_error(error, request_id).body()["error"]
            event = {**told, "type": "error", "sequence_number": self._last + 1}
            await writer.events((event,))
        await writer.end()

    async def _read(self, writer: EventWriter) -> None:
        after, is_over = b"0", False
        while True:
            after, texts = await self._service.store.read_events(self._tenant, self._id, after)
            for text in texts:
                event = json.loads(text)
                if event["sequence_number"] > self._last:
                    self._last = event["sequence_number"]
                    await writer.events((event,))
                if is_last(event):
                    return
            if texts:
                continue
            stored = await self._service.find(self._tenant, self._id)
            if is_over:  # and what it had to say has not come
                await writer.events((self._lost(stored.response),))
                return
            is_over = stored.response["status"] in TERMINAL

    def _lost(self, response: dict[str, Any]) -> dict[str, Any]:
        number = self._last + 1
        return {"type": "response.failed", "sequence_number": number, "response": response}


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
