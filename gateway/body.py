"""The route class of endpoints that take JSON."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from baton.errors import BatonError, InvalidRequest
from baton.gateway.strict_json import MAX_BYTES_AT_ONCE, parse_json
from baton.settings import LimitSettings

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
OnRefused = Callable[[str, Exception], None]  # (path of the route, why)


class _JsonRequest(Request):
    """Reads the body once, before FastAPI asks for it."""

    async def load(self, limits: LimitSettings) -> None:
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                body = await self.body()
        except TimeoutError:
            raise HTTPException(408, "The body did not arrive in time.") from None
        if not body:
            raise InvalidRequest("The body is empty.")
        bounds = (limits.max_json_depth, limits.max_json_keys, limits.max_json_values)
        if len(body) > MAX_BYTES_AT_ONCE:
            self._parsed = await asyncio.to_thread(parse_json, body, *bounds)
        else:
            self._parsed = parse_json(body, *bounds)

    async def json(self) -> Any:
        return self._parsed


def json_route(limits: LimitSettings, on_refused: OnRefused) -> type[APIRoute]:
    """The route class of endpoints that take JSON. `on_refused` hears of every request that does
    not get as far as an answer."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()

            async def strict(request: Request) -> Response:
                parsed = _JsonRequest(request.scope, request.receive)
                try:
                    await parsed.load(limits)
                    return await handler(parsed)
                except (BatonError, RequestValidationError, HTTPException) as error:
                    on_refused(self.path, error)
                    raise

            return strict

    return JsonRoute
