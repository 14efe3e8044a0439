"""JSON bodies, read strictly: what Python's parser tolerates but JSON does not mean is refused."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from baton.errors import BatonError, InvalidRequest
from baton.settings import LimitSettings

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_MAX_BYTES_AT_ONCE = 256 * 2**10  # of JSON that is parsed without letting anybody else run
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
OnRefused = Callable[[str, Exception], None]  # (path of the route, why)


def parse_json(body: bytes, max_depth: int) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no duplicate keys, no lone surrogates, no number that
    Python refuses to read, nothing nested deeper than `max_depth`.

    Raises:
        InvalidRequest
    """
    _check_depth(body, max_depth)
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
        if _SURROGATE_ESCAPE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not JSON: {error.msg} at {error.pos}.") from None
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not UTF-8.") from None
    except UnicodeEncodeError:
        raise InvalidRequest("The body has a lone surrogate in a string.") from None
    except ValueError:
        raise InvalidRequest("The body has a number with too many digits.") from None
    return value


def _check_depth(body: bytes, max_depth: int) -> None:
    """Before parsing, since the parser recurses."""
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    brackets = _STRING.sub(b"", body).translate(_ONE_KIND, _NOT_BRACKETS)
    for _ in range(max_depth):  # each pass takes the innermost level away
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets or brackets.count(b"[") > max_depth:
        raise InvalidRequest(f"The body is nested deeper than {max_depth} levels.")


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not JSON: {name} is not a JSON number.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidRequest("The body has an object with the same key twice.")
    return value


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
        if len(body) > _MAX_BYTES_AT_ONCE:
            self._parsed = await asyncio.to_thread(parse_json, body, limits.max_json_depth)
        else:
            self._parsed = parse_json(body, limits.max_json_depth)

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
