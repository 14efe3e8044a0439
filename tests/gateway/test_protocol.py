"""What strange clients send, byte by byte, to a real server: each is told in our words, or dropped;
none waits for ever, none is remembered without bound."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from baton.settings import LimitSettings
from tests.gateway.fakes import FakeBackend
from tests.gateway.test_errors import COMPLETIONS, error_of

BODY = b'{"prompt": [1], "max_tokens": 2}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings(
        max_body_bytes=2**20, max_header_bytes=2**14, header_timeout_s=0.3, body_timeout_s=0.3
    )


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    @property
    def is_answered(self) -> bool:
        return self.reader.at_eof() or bool(self.reader._buffer)  # type: ignore[attr-defined]

    async def answer(self) -> httpx.Response:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
        status, *lines = head.decode().strip().split("\r\n")
        headers = [tuple(line.split(": ", 1)) for line in lines]
        size = dict(headers).get("content-length", "0")
        content = await self.reader.readexactly(int(size))
        return httpx.Response(int(status.split()[1]), headers=headers, content=content)  # type: ignore[arg-type]

    async def closed(self) -> bytes:
        """Everything until the other end hangs up."""
        with suppress(OSError):
            return await asyncio.wait_for(self.reader.read(), 5)
        return b""


@pytest.fixture
async def connection(server: str) -> AsyncIterator[Connection]:
    async with connected(server) as connection:
        yield connection


@asynccontextmanager
async def connected(server: str) -> AsyncIterator[Connection]:
    host, port = server.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


async def test_a_good_request_and_another_on_the_same_connection(connection: Connection) -> None:
    for _ in range(2):
        connection.send(WHOLE)
        assert (await connection.answer()).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # a TLS hello
        b"PING\r\n",
        b"*1\r\n$4\r\nPING\r\n",  # Redis
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA\x00B: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: ten\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n",
    ],
)
async def test_what_is_not_http(connection: Connection, data: bytes) -> None:
    connection.send(data)
    response = await connection.answer()
    assert error_of(response, 400)["code"] == "bad_request"
    assert response.headers["connection"] == "close"
    assert await connection.closed() == b""


async def test_bad_chunks_reach_nobody(connection: Connection, backend: FakeBackend) -> None:
    connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert error_of(await connection.answer(), 400)["code"] == "bad_request"
    assert await connection.closed() == b""
    assert not backend.streams


class TestSlowness:
    @pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /ver", HEAD])
    async def test_of_the_head(self, connection: Connection, sent: bytes) -> None:
        connection.send(sent)
        if sent.strip():
            assert error_of(await connection.answer(), 408)["code"] == "request_timeout"
        assert await connection.closed() == b""

    async def test_a_byte_now_and_then_does_not_help(self, connection: Connection) -> None:
        with suppress(ConnectionError):
            for byte in HEAD * 3:
                connection.send(bytes((byte,)))
                await connection.writer.drain()
                await asyncio.sleep(0.02)
                if connection.is_answered:
                    break
            else:
                pytest.fail("it may be sent byte by byte")
        assert b"408" in await connection.closed()

    async def test_of_the_second_head_on_a_connection(self, connection: Connection) -> None:
        connection.send(WHOLE)
        await connection.answer()
        connection.send(b"POST /v1/compl")
        assert (await connection.answer()).status_code == 408

    @pytest.mark.parametrize("framing", [b"Content-Length: 99", b"Transfer-Encoding: chunked"])
    async def test_of_the_body(self, connection: Connection, framing: bytes) -> None:
        connection.send(HEAD + framing + b"\r\n\r\n")
        response = await connection.answer()
        assert error_of(response, 408)["code"] == "request_timeout"
        assert await connection.closed() == b""

    async def test_an_answer_may_take_longer_than_a_head(
        self, connection: Connection, backend: FakeBackend
    ) -> None:
        gate = asyncio.Event()
        play = backend.script
        backend.script = lambda request: [gate, *play(request)]
        connection.send(WHOLE)
        await asyncio.sleep(0.5)
        gate.set()
        assert (await connection.answer()).status_code == 200


class TestSize:
    async def test_a_declared_size_is_refused_at_once(self, connection: Connection) -> None:
        connection.send(HEAD + b"Content-Length: 10737418240\r\n\r\n")
        response = await asyncio.wait_for(connection.answer(), 5)
        assert error_of(response, 413)["code"] == "body_too_large"
        assert await connection.closed() == b""

    async def test_of_a_body_whose_size_is_not_declared(self, connection: Connection) -> None:
        connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with suppress(ConnectionError):
            for _ in range(40):
                connection.send(b"10000\r\n" + bytes(2**16) + b"\r\n")
                await connection.writer.drain()
        assert b" 413 " in await connection.closed()

    @pytest.mark.parametrize(
        "start",
        [
            HEAD + b"X: ",
            HEAD + b"X",
            b"GET /",
            b"\r\n",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: ",
        ],
    )
    async def test_nothing_else_is_endless(self, connection: Connection, start: bytes) -> None:
        """Headers, a header's name, the request line, empty lines, chunk extensions, trailers."""
        connection.send(start)
        filler = b"\r\n" * 2**12 if start == b"\r\n" else b"a" * 2**13
        num_sent = 0
        with suppress(ConnectionError):
            while not connection.is_answered and num_sent < 2**24:
                connection.send(filler)
                num_sent += len(filler)
                await connection.writer.drain()
                await asyncio.sleep(0.001)
        assert num_sent < 2**20
        await connection.closed()

    async def test_many_trailers(self, connection: Connection, backend: FakeBackend) -> None:
        """Trailers are skipped; they neither become headers nor pile up."""
        chunked = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
        trailers = b"Authorization: x\r\n" * 100
        connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + trailers + b"\r\n")
        assert (await connection.answer()).status_code == 200

    async def test_of_the_heads_headers(self, connection: Connection) -> None:
        connection.send(b"GET /version HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**14 + b"\r\n\r\n")
        assert error_of(await connection.answer(), 431)["code"] == "headers_too_large"


class TestBodiesTogether:
    @pytest.fixture
    def limits(self) -> LimitSettings:
        return LimitSettings(max_buffered_body_bytes=100_000, body_timeout_s=30)

    async def test_are_bounded(self, server: str, backend: FakeBackend) -> None:
        """What is half sent counts until its connection ends."""
        async with connected(server) as big, httpx.AsyncClient() as client:
            big.send(HEAD + b"Content-Length: 200000\r\n\r\n" + b" " * 90_000)
            url = f"http://{server}{COMPLETIONS}"
            body = {"prompt": "Hi", "user": "x" * 20_000}
            while (response := await client.post(url, json=body)).status_code == 200:
                await asyncio.sleep(0.01)
            assert error_of(response, 429)["code"] == "server_is_overloaded"
            assert int(response.headers["retry-after"]) >= 1
            assert (await client.post(url, json={"prompt": "Hi"})).status_code == 200
            big.writer.transport.abort()
            while (await client.post(url, json=body)).status_code != 200:
                await asyncio.sleep(0.01)

    async def test_what_is_read_counts_no_more(self, server: str, backend: FakeBackend) -> None:
        gate = asyncio.Event()
        play = backend.script
        backend.script = lambda request: [gate, *play(request)]
        body = {"prompt": [1], "user": "x" * 90_000}
        async with httpx.AsyncClient() as client:
            posts: list[asyncio.Task[httpx.Response]] = []
            for number in range(5):
                post = client.post(f"http://{server}{COMPLETIONS}", json=body)
                posts.append(asyncio.create_task(post))
                while len(backend.streams) <= number and not posts[-1].done():
                    await asyncio.sleep(0.01)
            gate.set()
            assert [(await post).status_code for post in posts] == [200] * 5


async def test_a_host_is_never_an_address(client: httpx.AsyncClient) -> None:
    """Neither redirects nor documents are made of it."""
    for path in ("/v1/models/", "/docs", "/openapi.json", "/nope"):
        response = await client.get(path, headers={"Host": "evil.example"})
        assert "evil.example" not in response.text + json.dumps(dict(response.headers))


async def test_waiting_to_be_told_to_continue(connection: Connection) -> None:
    connection.send(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
    assert await connection.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.send(BODY)
    assert (await connection.answer()).status_code == 200


async def test_an_upgrade_is_not_taken_up(connection: Connection) -> None:
    head: Any = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    connection.send(head + b"\r\n")
    assert (await connection.answer()).status_code == 200


async def test_an_upgrade_is_ignored(connection: Connection) -> None:
    asks = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    for _ in range(2):
        connection.send(WHOLE.replace(b"Host: x\r\n", b"Host: x\r\n" + asks))
        assert (await connection.answer()).status_code == 200


async def test_only_chunks_are_understood(connection: Connection) -> None:
    coded = HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n%x\r\n" % len(BODY)
    connection.send(coded + BODY + b"\r\n0\r\n\r\n")
    error_of(await connection.answer(), 400)
