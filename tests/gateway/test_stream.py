"""What happens on the wire: clients that leave, that do not read, that wait; late failures."""

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message

from baton.errors import BatonError, Cause
from baton.gateway.backend import ServedModel
from baton.gateway.context import Context
from baton.settings import LimitSettings
from baton.text import Tokenizer
from baton.types import Request
from tests.gateway.fakes import FakeBackend, FakeStream, Script, Step, chunks

COMPLETIONS = "/v1/completions"


class Call:
    """One HTTP request to an ASGI application, message by message."""

    def __init__(self, app: FastAPI, body: dict[str, Any], path: str = COMPLETIONS) -> None:
        self.sent: list[Message] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        self._body = json.dumps(body).encode()
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.done = asyncio.create_task(app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> Message:
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.may_send.wait()
        self.sent.append(message)
        self._changed.set()

    async def until(self, text: str) -> None:
        while text not in self.text:
            self._changed.clear()
            await self._changed.wait()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def ended(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", True)


async def opened(backend: FakeBackend) -> FakeStream:
    while not backend.streams:
        await asyncio.sleep(0)
    return backend.streams[-1]


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings(sse_keep_alive_interval=0, slow_client_timeout_s=60)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token(
    app: FastAPI, backend: FakeBackend, context: Context, stream: bool
) -> None:
    backend.script = lambda request: [asyncio.Event()]
    call = Call(app, {"prompt": "Hi", "stream": stream})
    fake = await opened(backend)
    assert not fake.aborted.is_set()
    call.leave()
    await asyncio.wait_for(fake.aborted.wait(), 30)
    await asyncio.wait_for(call.done, 30)
    assert not call.sent
    count = context.metrics.requests.labels(COMPLETIONS, "cancelled")._value.get()
    assert count == 1
    assert context.metrics.requests_open._value.get() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_between_tokens(
    app: FastAPI, backend: FakeBackend, say: Callable[[str], Script], stream: bool
) -> None:
    play = say("Hello world")
    backend.script = lambda request: [*play(request)[:2], asyncio.Event(), *play(request)[2:]]
    call = Call(app, {"prompt": ["Hi", "you"], "stream": stream})
    await opened(backend)
    if stream:
        await call.until("data: ")
    call.leave()
    await asyncio.wait_for(call.done, 30)
    assert len(backend.streams) == 2
    assert all(fake.aborted.is_set() for fake in backend.streams)
    assert "[DONE]" not in call.text


async def test_leaving_while_the_prompt_is_tokenized(
    app: FastAPI, backend: FakeBackend, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizing, finish = asyncio.Event(), asyncio.Event()

    async def encode(text: str, **_: Any) -> list[int]:
        tokenizing.set()
        await finish.wait()
        return [1]

    monkeypatch.setattr(context.tokenizers, "encode", encode)
    call = Call(app, {"prompt": "Hi", "stream": True})
    await tokenizing.wait()
    call.leave()
    await asyncio.sleep(0)
    finish.set()
    await asyncio.wait_for(call.done, 30)
    assert not backend.streams


async def test_nothing_is_sent_before_the_first_token(app: FastAPI, backend: FakeBackend) -> None:
    gate = asyncio.Event()
    backend.script = lambda request: [gate, BatonError(Cause.DEADLINE_EXCEEDED, "too late")]
    call = Call(app, {"prompt": "Hi", "stream": True})
    await opened(backend)
    assert call.status is None
    gate.set()
    await asyncio.wait_for(call.done, 30)
    assert call.status == 504
    assert json.loads(call.text)["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("error", [BatonError(Cause.WORKER_LOST, "10.0.0.7 died"), KeyError("x")])
async def test_a_failure_after_the_first_token_is_an_event(
    app: FastAPI, backend: FakeBackend, say: Callable[[str], Script], error: Exception
) -> None:
    play = say("Hello world")
    backend.script = lambda request: [play(request)[0], error]  # type: ignore[list-item]
    call = Call(app, {"prompt": "Hi", "stream": True})
    await asyncio.wait_for(call.done, 30)
    assert call.status == 200
    assert call.ended
    *_, last, rest = call.text.split("\n\n")
    assert rest == ""
    body = json.loads(last.removeprefix("data: "))
    assert body["error"]["code"] == ("worker_lost" if isinstance(error, BatonError) else "internal")
    assert "[DONE]" not in call.text
    assert "10.0.0.7" not in call.text
    assert backend.streams[0].aborted.is_set()


async def test_a_stream_that_ends_early_is_a_failure(
    app: FastAPI, backend: FakeBackend, say: Callable[[str], Script]
) -> None:
    play = say("Hello world")
    backend.script = lambda request: play(request)[:1]
    call = Call(app, {"prompt": "Hi"})
    await asyncio.wait_for(call.done, 30)
    assert call.status == 500


async def test_a_gap_in_the_tokens_is_a_failure(
    app: FastAPI, backend: FakeBackend, say: Callable[[str], Script]
) -> None:
    play = say("Hello world")
    backend.script = lambda request: [play(request)[0], *play(request)[2:]]
    call = Call(app, {"prompt": "Hi"})
    await asyncio.wait_for(call.done, 30)
    assert call.status == 500


class TestSilence:
    @pytest.fixture
    def limits(self) -> LimitSettings:
        return LimitSettings(sse_keep_alive_interval=0.2)

    async def test_a_silent_stream_gets_comments(
        self, app: FastAPI, backend: FakeBackend, say: Callable[[str], Script]
    ) -> None:
        gate = asyncio.Event()
        play = say("Hello world")
        backend.script = lambda request: [play(request)[0], gate, *play(request)[1:]]
        call = Call(app, {"prompt": "Hi", "stream": True})
        await call.until(": keep-alive\n\n: keep-alive\n\n")
        assert call.text.startswith("data: ")
        gate.set()
        await asyncio.wait_for(call.done, 30)
        data = [block for block in call.text.split("\n\n") if block.startswith("data: ")]
        assert data.pop() == "data: [DONE]"
        assert "".join(json.loads(d[6:])["choices"][0]["text"] for d in data) == "Hello world"

    async def test_also_while_waiting_for_the_first_token(
        self, app: FastAPI, backend: FakeBackend, say: Callable[[str], Script]
    ) -> None:
        gate = asyncio.Event()
        backend.script = lambda request: [gate, BatonError(Cause.WORKER_LOST, "")]
        call = Call(app, {"prompt": "Hi", "stream": True})
        await call.until(": keep-alive\n\n")
        assert call.status == 200
        gate.set()
        await asyncio.wait_for(call.done, 30)
        assert '"code":"worker_lost"' in call.text
        assert call.ended

    async def test_a_comment_that_waits_for_the_client_comes_before_the_next_event(
        self, app: FastAPI, backend: FakeBackend, say: Callable[[str], Script]
    ) -> None:
        """It opens the response, and the client does not read when it comes."""
        gate = asyncio.Event()
        backend.script = lambda request: [gate, *say("Hello world")(request)]
        call = Call(app, {"prompt": "Hi", "stream": True})
        call.may_send.clear()
        await asyncio.sleep(0.4)
        gate.set()
        await asyncio.sleep(0.1)
        assert not call.sent
        call.may_send.set()
        await asyncio.wait_for(call.done, 30)
        assert call.status == 200
        assert call.sent[1]["body"] == b": keep-alive\n\n"
        assert call.ended


class TestSlowReaders:
    @pytest.fixture
    def limits(self) -> LimitSettings:
        return LimitSettings(slow_client_timeout_s=0.05)

    async def test_a_client_that_does_not_read_is_dropped(
        self, app: FastAPI, backend: FakeBackend, tokenizer: Tokenizer
    ) -> None:
        gate = asyncio.Event()
        ids = tokenizer.encode("word " * 50)

        def script(request: Request) -> list[Step]:
            first, *rest = chunks(request, ids)
            return [first, gate, *rest]

        backend.script = script
        call = Call(app, {"prompt": "Hi", "stream": True, "max_tokens": 200})
        await call.until("data: ")
        num_sent = len(call.sent)
        call.may_send.clear()
        gate.set()
        await asyncio.wait_for(call.done, 5)
        assert backend.streams[0].aborted.is_set()
        assert len(call.sent) == num_sent
        assert not call.ended


class TestOverTcp:
    """The same with a real server and sockets."""

    @pytest.fixture
    def model(self) -> ServedModel:
        return ServedModel("tiny", max_model_len=10**6, vocab_size=4096, eos_token_ids=())

    @asynccontextmanager
    async def _request(self, server: str, body: dict[str, Any]) -> Any:
        host, port = server.split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**12)
        payload = json.dumps(body).encode()
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        writer.write(head.encode() + payload)
        try:
            yield reader
        finally:
            writer.transport.abort()

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_closed_connection_aborts(
        self, server: str, backend: FakeBackend, stream: bool
    ) -> None:
        backend.script = lambda request: [asyncio.Event()]
        async with self._request(server, {"prompt": "Hi", "stream": stream}):
            while not backend.streams:
                await asyncio.sleep(0.001)
        await asyncio.wait_for(backend.streams[0].aborted.wait(), 30)

    async def test_an_unread_stream_holds_up_its_own_tokens_only(
        self, server: str, backend: FakeBackend, tokenizer: Tokenizer
    ) -> None:
        """Once the buffers of the connection are full, the gateway takes no more tokens."""
        num_tokens = 100_000
        ids = tokenizer.encode("word")[:1] * num_tokens
        backend.script = lambda request: chunks(request, ids)
        body = {"prompt": "Hi", "stream": True, "max_tokens": num_tokens}
        async with self._request(server, body) as reader:
            await reader.readuntil(b"data: ")
            fake = backend.streams[0]
            left = -1
            while left != (left := len(fake._steps)):
                await asyncio.sleep(0.2)
            assert 0 < left < num_tokens
        await asyncio.wait_for(fake.aborted.wait(), 30)


async def test_a_finished_request_is_one_log_line_without_its_text(
    app: FastAPI, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "baton.gateway"):
        call = Call(app, {"prompt": "a secret prompt", "stream": True})
        await call.done
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("baton.gateway")]
    assert line.startswith("/v1/completions ok cmpl-")
    assert "secret" not in line
    assert "Hello" not in line
    for part in ("cached 2", "tokenize", "queue", "prefill", "first_byte", "4096 B over grpc"):
        assert part in line


async def test_whoever_has_read_the_end_finds_it_counted(
    app: FastAPI, backend: FakeBackend, context: Context, say: Callable[[str], Script]
) -> None:
    counted: list[float] = []

    class Reader(Call):
        async def _send(self, message: Message) -> None:
            await super()._send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                asyncio.get_running_loop().call_soon(count)

    def count() -> None:
        counted.append(context.metrics.requests.labels(COMPLETIONS, "ok")._value.get())

    backend.script = say("Hello world")
    for stream in (True, False):
        await asyncio.wait_for(Reader(app, {"prompt": "Hi", "stream": stream}).done, 30)
        await asyncio.sleep(0)
    assert counted == [1, 2]
