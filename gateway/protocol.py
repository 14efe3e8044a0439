"""HTTP/1.1 as uvicorn reads it, with bounds where it has none: the time and the size of a request's
head, and of everything else that is not body; and with our body where it answers in plain text.
"""

import asyncio
import re

from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from baton.gateway.errors import api_error
from baton.settings import LimitSettings

_LINGER_S = 1.0
_UPGRADE = re.compile(rb"\r\nUpgrade:[^\r\n]*", re.IGNORECASE)


def _without_upgrade(data: bytes) -> bytes:
    """Java's client asks for HTTP/2 in passing. It may be ignored, but the parser would take a body
    behind such a head for HTTP/2, and leave it out."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + rest if b"pgrade:" in head else data


def http_protocol(limits: LimitSettings) -> type[HttpToolsProtocol]:
    """What uvicorn takes as `http`."""

    class Protocol(_BoundedProtocol):
        _limits = limits

    return Protocol


class _BoundedProtocol(HttpToolsProtocol):
    _limits: LimitSettings
    _head_timer: asyncio.TimerHandle | None = None
    _in_head = False
    _has_progressed = False  # within this call of data_received
    _linger: asyncio.TimerHandle | None = None  # what still comes is of no interest
    _num_idle_bytes = 0  # since the parser last finished a head or gave out body

    # ── from the transport ───────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._linger is not None:
            self._linger.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._linger is not None:
            return
        self._has_progressed = False
        super().data_received(_without_upgrade(data) if self._is_idle else data)
        if self._linger is not None or self.transport.is_closing():
            return
        self._num_idle_bytes = 0 if self._has_progressed else self._num_idle_bytes + len(data)
        if self._num_idle_bytes > self._limits.max_header_bytes:
            self._refuse(431, "The headers are too large.")
        elif self._head_timer is None and self._is_idle:
            self._start_timer()

    # ── from the parser ──────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        self._has_progressed = self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # not a trailer: nobody reads those
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_progressed = True
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_progressed = True
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    # ── refusing ─────────────────────────────────────────────────────────────────────────────────

    @property
    def _is_idle(self) -> bool:
        """Nothing is being answered, so only a head can come."""
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self._limits.header_timeout_s, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if self._in_head:
            self._refuse(408, "The headers did not arrive in time.")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer and hang up, but not before a client that is still writing had time to read it. An
        answer that is under way is cut; one that has not begun gives way."""
        self._stop_timer()
        if not self._is_idle:
            if self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True  # as when the connection is lost
            self.cycle.message_event.set()
        if self._linger is None:
            response = api_error(HTTPException(status, message), "").response()
            head = [STATUS_LINE[status]]
            for name, value in [*response.raw_headers, (b"connection", b"close")]:
                head += [name, b": ", value, b"\r\n"]
            self.transport.write(b"".join([*head, b"\r\n", bytes(response.body)]))
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._linger = self.loop.call_later(_LINGER_S, self.transport.close)
