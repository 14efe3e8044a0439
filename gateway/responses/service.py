"""What may become of responses beyond their answer: found, continued, cancelled, deleted."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import Request

from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.errors import Refusal
from baton.gateway.responses.background import Background, Run
from baton.gateway.responses.events import TERMINAL
from baton.gateway.responses.fields import ResponsesRequest
from baton.gateway.responses.items import Chat, Items, to_messages
from baton.gateway.responses.store import ResponseStore, StoredResponse, StoreUnavailable

_ID = re.compile(r"resp_[0-9a-f]{32}")
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})[0-9]{1,4}")  # that of its response, and a number
_GONE = {"code": "server_error", "message": "The gateway that ran this response is gone."}


def not_found(param: str | None = None) -> Refusal:
    """Of another key, expired, or never there: all the same."""
    return Refusal(404, "The response does not exist.", code="response_not_found", param=param)


class ResponseService:
    """Without a store nothing is kept, and nothing found."""

    def __init__(self, store: ResponseStore | None = None, *, max_background: int = 0) -> None:
        self._store = store
        self._background = None if store is None else Background(store, max_background)

    async def close(self) -> None:
        """Waits for what runs in the background."""
        if self._background is not None:
            await self._background.close()
        if self._store is not None:
            await self._store.close()

    @property
    def store(self) -> ResponseStore:
        """
        Raises:
            Refusal: there is none.
        """
        if self._store is None:
            raise not_found()
        return self._store

    @staticmethod
    def tenant(request: Request) -> str:
        return str(request.state.tenant)

    # ── before an answer ─────────────────────────────────────────────────────────────────────────

    async def keeps(self, body: ResponsesRequest) -> bool:
        """Whether the response is to be stored. Who asks for that in so many words gets it or an
        error; who just does not forbid it gets an answer in any case.

        Raises:
            BatonError: OVERLOADED, too much runs in the background.
            InvalidRequest: this server stores nothing.
            StoreUnavailable
        """
        asked = bool(body.store or body.background)
        if self._store is None or self._background is None:
            if asked:
                param = "background" if body.background else "store"
                raise InvalidRequest("Nothing is stored here.", param, Cause.UNSUPPORTED)
            return False
        if body.background and self._background.is_full:
            raise BatonError(Cause.OVERLOADED, "Too many responses run in the background.")
        if asked:
            await self._store.ping()
        return body.store is not False

    async def items(self, tenant: str, body: ResponsesRequest) -> Items:
        """The input, with the items of stored responses that it refers to.

        Raises:
            Refusal: 404.
            StoreUnavailable
        """
        found: dict[str, Mapping[str, Any]] = {}
        items = []
        for item in body.items:
            match item:
                case {"type": "item_reference", "id": str() as item_id}:
                    if item_id not in found:
                        found |= await self._items_beside(tenant, item_id)
                    items.append(found[item_id])
                case _:
                    items.append(item)
        return items

    async def _items_beside(self, tenant: str, item_id: str) -> dict[str, Mapping[str, Any]]:
        """All items of its response, by id."""
        match = _ITEM_ID.fullmatch(item_id)
        stored = await self.find(tenant, f"resp_{match[1]}" if match else "", "input")
        items = {item["id"]: item for item in stored.response["output"]}
        if item_id not in items:
            raise not_found("input")
        return items

    async def conversation(self, tenant: str, body: ResponsesRequest, items: Items) -> Chat:
        """What was said so far, and the input.

        Raises:
            InvalidRequest
            Refusal: 404.
            StoreUnavailable
        """
        new = to_messages(items)
        if body.previous_response_id is None:
            return new
        param = "previous_response_id"
        stored = await self.find(tenant, body.previous_response_id, param)
        if stored.response["status"] not in TERMINAL:
            raise InvalidRequest("That response is not over yet.", param)
        said = [
            item
            for item in stored.response["output"]
            if item["type"] != "function_call" or item["status"] == "completed"
        ]
        return [*stored.messages, *to_messages(said), *new]

    # ── behind an answer ─────────────────────────────────────────────────────────────────────────

    async def keep(self, tenant: str, response: dict[str, Any], messages: Chat) -> None:
        """Store it, if it is to be stored; where that fails, the response says so."""
        if not response["store"]:
            return
        try:
            response["store"] = await self.store.put(tenant, StoredResponse(response, messages, ""))
        except StoreUnavailable:
            response["store"] = False

    async def run(self, run: Run) -> None:
        """In the background.

        Raises:
            InvalidRequest: it is too large to be stored.
            StoreUnavailable
        """
        assert self._background is not None, "`keeps` said so"
        if not await self._background.start(run):
            raise InvalidRequest("input is too large to be stored.", "input")

    # ── later ────────────────────────────────────────────────────────────────────────────────────

    async def find(self, tenant: str, response_id: str, param: str | None = None) -> StoredResponse:
        """
        Raises:
            Refusal: 404, which names `param`.
            StoreUnavailable
        """
        if self._store is None or self._background is None or not _ID.fullmatch(response_id):
            raise not_found(param)
        stored = await self._store.get(tenant, response_id)
        if stored is None:
            raise not_found(param)
        if await self._background.is_lost(stored):
            failed = {**stored.response, "status": "failed", "error": _GONE}
            stored = replace(stored, response=failed)
        return stored

    async def cancel(self, tenant: str, stored: StoredResponse) -> None:
        """Whichever gateway runs it; it is over a moment later.

        Raises:
            StoreUnavailable
        """
        if stored.response["status"] in TERMINAL or self._background is None:
            return
        if not self._background.cancel(stored.response["id"]):
            await self.store.ask_to_cancel(tenant, stored.response["id"])

    async def delete(self, tenant: str, response_id: str) -> None:
        """
        Raises:
            Refusal: 404.
            StoreUnavailable
        """
        if not await self.store.delete(tenant, response_id):
            raise not_found()
