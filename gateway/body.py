"""The route class of endpoints that take JSON."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from baton.errors import BatonError, InvalidRequest
from baton.gateway.errors import ERROR_RESPONSES
from baton.gateway.strict_json import MAX_BYTES_AT_ONCE, parse_json
from baton.settings import LimitSettings

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
OnRefused = Callable[[str, Exception], None]  # (path of the route, why)


class _JsonRequest(Request):
    """Reads the body once, before FastAPI asks for it."""

    async def load(self, limits: LimitSettings, turn: asyncio.Semaphore) -> None:
        """`turn`: to parse a large body."""
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                body = await self.body()
        except TimeoutError:
            raise HTTPException(408, "The body did not arrive in time.") from None
        if not body:
            raise InvalidRequest("The body is empty.")
        bounds = (limits.max_json_depth, limits.max_json_keys, limits.max_json_values)
        if len(body) > MAX_BYTES_AT_ONCE:
            async with turn:
                self._parsed = await asyncio.to_thread(parse_json, body, *bounds)
        else:
            self._parsed = parse_json(body, *bounds)

    async def json(self) -> Any:
        return self._parsed


def json_route(limits: LimitSettings, on_refused: OnRefused) -> type[APIRoute]:
    """The route class of endpoints that take JSON. `on_refused` hears of every request that does
    not get as far as an answer."""

    # The parser keeps the interpreter lock for long stretches. Threads that do so one after the
    # other would keep it from the event loop for as long as all of them together take.
    turn = asyncio.Semaphore(1)

    class JsonRoute(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            options["responses"] = {**ERROR_RESPONSES, **(options.get("responses") or {})}
            super().__init__(path, endpoint, **options)

        def get_route_handler(self) -> Handler:
            handler = _direct_handler(self) or super().get_route_handler()

            async def strict(request: Request) -> Response:
                parsed = _JsonRequest(request.scope, request.receive)
                try:
                    await parsed.load(limits, turn)
                    return await handler(parsed)
                except (BatonError, RequestValidationError, HTTPException) as error:
                    on_refused(self.path, error)
                    raise

            return strict

    return JsonRoute


def _direct_handler(route: APIRoute) -> Handler | None:
    """What FastAPI's handler does for an endpoint that takes a body, perhaps the request, and gives
    a response, without what that handler does for all others: half of its time. None: this is not
    such an endpoint."""
    dependant, field = route.dependant, route.body_field
    endpoint, request_name = route.endpoint, dependant.request_param_name
    others = (
        dependant.path_params,
        dependant.query_params,
        dependant.header_params,
        dependant.cookie_params,
        dependant.dependencies,
    )
    is_alone = len(dependant.body_params) == 1 and not any(others)
    if field is None or not is_alone or route.response_class is not Response:
        return None
    body_name = dependant.body_params[0].name

    async def handle(request: Request) -> Response:
        body, errors = field.validate(await request.json(), loc=("body",))
        if errors:
            raise RequestValidationError(errors)
        values = {body_name: body}
        if request_name is not None:
            values[request_name] = request
        response: Response = await endpoint(**values)
        return response

    return handle
