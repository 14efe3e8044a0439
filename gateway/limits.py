"""What is checked before anything is parsed: one ASGI layer in front of everything.

In this order: size of the headers, framing, key, media type, declared length. Then the body's bytes
are counted while the application reads them. Every answer carries `X-Request-Id`.
"""

import asyncio
import contextlib
import hashlib
import hmac
import re
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.errors import BatonError, Cause
from baton.gateway.errors import api_error
from baton.settings import LimitSettings

# Probes and scrapers have no key; these say nothing about requests.
OPEN_PATHS = frozenset(
    {"/health", "/ping", "/version", "/load", "/metrics", "/docs", "/openapi.json"}
)
_UNSAFE_ID_CHARS = re.compile(r"[^A-Za-z0-9._:-]")
_MAX_ID_CHARS = 128
_LINGER_S = 1.0


class Keys:
    """The API keys that are valid now; no key configured means that none is asked for."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [self._digest(key.encode()) for key in keys]

    @staticmethod
    def _digest(key: bytes) -> bytes:
        return hashlib.sha256(key).digest()

    def accept(self, authorization: str | None) -> bool:
        """Takes the same time whichever key matches, or none."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        # Header values are Latin-1 on the wire; the same bytes are the key's UTF-8.
        given = self._digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == "bearer"

    def tenant(self, authorization: str | None) -> str:
        """Who an accepted key stands for; says nothing about the key. Without keys all are one."""
        if not self._digests:
            return "public"
        key = (authorization or "").partition(" ")[2].strip().encode("latin-1")
        return hashlib.sha256(b"baton-tenant-1" + key).hexdigest()


def _authorization(headers: Headers) -> str | None:
    """OpenAI's way to send a key, or Anthropic's."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (None if key is None else f"Bearer {key}")


class Guard:
    """The ASGI layer. Sets in its state `request_id` (for logs and headers only), `tenant`, and
    `send_more`: for parts of a body that others follow, past all layers behind this one, which have
    to do only with the start and the end of a response."""

    def __init__(self, app: ASGIApp, limits: LimitSettings, keys: Sequence[str] = ()) -> None:
        self._app = app
        self._limits = limits
        self._keys = Keys(keys)
        self._num_buffered_bytes = 0  # of all bodies that are being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["tenant"] = self._keys.tenant(_authorization(headers))
        state["send_more"] = send

        body = _Body(receive, self._limits, self._buffer)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["X-Request-Id"] = request_id
                if not body.is_complete:  # nor will it be
                    answer["Connection"] = "close"
            elif not message.get("more_body", False) and not body.is_complete:
                await send({**message, "more_body": True})
                if "expect" not in headers:
                    await body.discard()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self._check(scope, headers)
        except (BatonError, HTTPException) as error:
            response = api_error(error, request_id).response()
            await response(scope, receive, send_with_id)
            return
        body.is_complete = not _has_body(headers)
        try:
            await self._app(scope, body.receive, send_with_id)
        finally:
            body.release()

    def _check(self, scope: Scope, headers: Headers) -> None:
        limits = self._limits
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > limits.max_header_bytes or len(scope["headers"]) > limits.max_headers:
            raise HTTPException(431, "The headers are too large.")
        lengths = headers.getlist("content-length")
        chunked = "transfer-encoding" in headers
        if len(lengths) > 1 or (lengths and chunked):
            raise HTTPException(400, "Content-Length and Transfer-Encoding contradict each other.")
        if chunked and headers["transfer-encoding"].strip().lower() != "chunked":
            raise HTTPException(400, "Transfer-Encoding may be chunked only.")
        if scope["path"] not in OPEN_PATHS and not self._keys.accept(_authorization(headers)):
            raise BatonError(Cause.UNAUTHENTICATED, "Missing or incorrect API key.")
        declared = int(lengths[0]) if lengths and lengths[0].isdecimal() else 0
        if declared > limits.max_body_bytes:
            raise HTTPException(413, f"The body may have {limits.max_body_bytes} bytes at most.")
        if _has_body(headers):
            _check_media_type(headers)

    def _buffer(self, num_bytes: int) -> None:
        """
        Raises:
            BatonError: OVERLOADED, all bodies together are too much.
        """
        num_held = self._num_buffered_bytes + num_bytes
        if num_bytes > 0 and num_held > self._limits.max_buffered_body_bytes:
            raise BatonError(Cause.OVERLOADED, "Too many large bodies are being read.")
        self._num_buffered_bytes = num_held


class _Body:
    """Counts a body's bytes while the application reads them.

    `buffer` is told what is held, and with a negative number what is held no more: once the
    application listens again after the last byte, it has made something else of them.
    """

    def __init__(
        self, receive: Receive, limits: LimitSettings, buffer: Callable[[int], None]
    ) -> None:
        self.is_complete = False
        self._receive = receive
        self._max_bytes = limits.max_body_bytes
        self._buffer = buffer
        self._num_bytes = 0
        self._num_held = 0

    async def receive(self) -> Message:
        """
        Raises:
            HTTPException: 413.
            BatonError: OVERLOADED.
        """
        if self.is_complete:
            self.release()
        message = await self._receive()
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            raise HTTPException(413, f"The body may have {self._max_bytes} bytes at most.")
        if message["type"] == "http.request":
            self._buffer(num_bytes)
            self._num_held += num_bytes
            self.is_complete = not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """For a while, so that a client which is still writing gets to read its answer."""
        num_left = 2 * self._max_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self.is_complete and num_left > 0:
                    message = await self._receive()
                    num_left -= len(message.get("body", b""))
                    self.is_complete = not message.get("more_body", False)

    def release(self) -> None:
        """Idempotent."""
        self._buffer(-self._num_held)
        self._num_held = 0


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _check_media_type(headers: Headers) -> None:
    media_type, *options = headers.get("content-type", "").lower().split(";")
    charsets = [o.partition("=")[2].strip(' "') for o in options if o.strip()[:8] == "charset="]
    if media_type.strip() != "application/json" or any(
        c not in ("utf-8", "utf8") for c in charsets
    ):
        raise HTTPException(415, "Content-Type must be application/json, in UTF-8.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Compressed bodies are not accepted.")


def _request_id(given: str | None) -> str:
    """The client's id without anything that could break a log line or a header; else a new one."""
    return _UNSAFE_ID_CHARS.sub("", given or "")[:_MAX_ID_CHARS] or uuid.uuid4().hex
