"""An asynchronous client of the HTTP API, for many requests at once.

aiohttp, since httpx costs twice as much for each streamed event (docs/decisions/http-client.md).
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp

from baton.client.urls import server_root

_CONNECT_TIMEOUT_S = 10.0
_READ_BUFFER_BYTES = 1 << 18
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_RETRIED = frozenset({408, 429, 502, 503, 504})
_TRANSPORT_ERRORS = (aiohttp.ClientError, OSError, TimeoutError)


class ApiError(Exception):
    """A request without an answer.

    `status`: the HTTP status of a refusal; None: no connection, or one that broke.
    `kind`: what failures are counted by, e.g. "429 server_is_overloaded", "connection refused".
    """

    def __init__(
        self,
        message: str,
        kind: str,
        *,
        status: int | None = None,
        body: Any = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.status = status
        self.body = body  # of a refusal, as JSON, where it was some
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def is_passing(self) -> bool:
        """The same request may succeed later."""
        return self.status is None or self.status in _RETRIED


class ApiClient:
    """Use it as an async context manager, in one event loop."""

    def __init__(
        self, url: str, *, api_key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            url: of the server, with or without `/v1`.

        Raises:
            ValueError: no HTTP URL.
        """
        self.root = server_root(url)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # whoever sends bounds what is under way
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers=self._headers,
            read_bufsize=_READ_BUFFER_BYTES,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def models(self) -> list[dict[str, Any]]:
        """What GET /v1/models lists.

        Raises:
            ApiError
        """
        answer = await self._json("GET", "/v1/models", None)
        models = answer.get("data") if isinstance(answer, dict) else None
        if not models or not all(isinstance(m, dict) and "id" in m for m in models):
            raise ApiError(f"{self.root} serves no model", "no model")
        return list(models)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer, parsed.

        Raises:
            ApiError
        """
        return await self._json("POST", path, body)

    async def post_patiently(
        self, path: str, body: Mapping[str, Any], patience_s: float = 60.0
    ) -> Any:
        """`post`, tried again after passing failures, at the times that the server names, as long
        as the next try starts within `patience_s`.

        Raises:
            ApiError: the last one.
        """
        started, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return await self.post(path, body)
            except ApiError as error:
                wait_s = max(error.retry_after_s or 0.0, pause_s * random.uniform(0.5, 1.0))
                if not error.is_passing or time.monotonic() + wait_s > started + patience_s:
                    raise
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[tuple[float, bytes]]:
        """(when it came, data) of each event of a stream; the time is `time.perf_counter()`'s.

        Raises:
            ApiError: refused, or the stream ended without `[DONE]`.
        """
        assert self._session is not None, "entered"
        rest = b""
        try:
            async with self._session.post(self.root + path, data=json.dumps(body)) as response:
                if response.status != 200:
                    raise await _refusal(response)
                async for data in response.content.iter_any():
                    now = time.perf_counter()
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:"):
                            payload = line[5:].strip()
                            if payload == b"[DONE]":
                                return
                            if payload.startswith(b'{"error"'):
                                raise _error_event(payload)
                            yield now, payload
        except _TRANSPORT_ERRORS as error:
            raise self._broken(error) from error
        raise ApiError(f"{self.root}: the stream ended early", "stream ended early")

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        assert self._session is not None, "entered"
        data = None if body is None else json.dumps(body)
        try:
            async with self._session.request(method, self.root + path, data=data) as response:
                if response.status != 200:
                    raise await _refusal(response)
                return await response.json(content_type=None)
        except ValueError as error:  # before aiohttp's, some of which are ValueErrors too
            raise ApiError(f"{self.root}{path}: no JSON ({error})", "no JSON") from error
        except _TRANSPORT_ERRORS as error:
            raise self._broken(error) from error

    def _broken(self, error: BaseException) -> ApiError:
        cause = getattr(error, "os_error", error)
        match cause:
            case ConnectionRefusedError():
                kind = "connection refused"
            case (
                ConnectionError() | aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError()
            ):
                kind = "connection lost"
            case TimeoutError():
                kind = "timeout"
            case _:
                kind = type(error).__name__
        return ApiError(f"{self.root}: {kind}", kind)


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    text = await response.text(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    message, code, param = _described(body)
    retry_after = response.headers.get("Retry-After", "")
    return ApiError(
        message or f"HTTP {response.status}: {text[:200]}",
        f"{response.status} {code}" if code else f"HTTP {response.status}",
        status=response.status,
        body=body,
        param=param,
        retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
    )


def _error_event(payload: bytes) -> ApiError:
    try:
        body = json.loads(payload)
    except ValueError:
        body = None
    message, code, param = _described(body)
    kind = f"in stream: {code or 'error'}"
    return ApiError(message or "the stream broke off", kind, body=body, param=param)


def _described(body: Any) -> tuple[str | None, str | None, str | None]:
    """(message, code or type, param) of an OpenAI error body."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return (error if isinstance(error, str) else None), None, None
    code = error.get("code")
    name = code if isinstance(code, str) else error.get("type")
    return error.get("message"), name, error.get("param")
