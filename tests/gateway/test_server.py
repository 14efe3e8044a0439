"""The server's life: a port that is taken, draining, being told twice."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from fastapi import FastAPI

from baton.config import GatewayConfig
from baton.errors import BatonError, Cause
from baton.gateway.context import Context
from baton.gateway.server import Server, listen, run
from tests.gateway.fakes import FakeBackend, Script
from tests.gateway.test_errors import COMPLETIONS, error_of


@dataclass
class Running:
    url: str
    serving: asyncio.Task[None]


async def accepts(url: str) -> bool:
    async with httpx.AsyncClient() as client:
        try:
            await client.get(url + "/version")
        except httpx.ConnectError:
            return False
        return True


@asynccontextmanager
async def running(
    app: FastAPI, context: Context, backend: FakeBackend, drain_s: float
) -> AsyncIterator[Running]:
    def drain() -> None:
        backend.is_ready = False

    with listen("127.0.0.1", 0, slow_client_s=1) as listener:
        server = Server(
            app,
            context.limits,
            drain_s,
            on_drain=drain,
            on_deadline=lambda: context.inflight.fail_all(BatonError(Cause.DRAINING, "over")),
        )
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield Running(f"http://127.0.0.1:{port}", serving)
        await asyncio.wait_for(serving, 5)


async def test_draining_lets_open_streams_finish(
    app: FastAPI, context: Context, backend: FakeBackend, say: Callable[[str], Script]
) -> None:
    gate = asyncio.Event()
    play = say("Hello world")
    backend.script = lambda request: [play(request)[0], gate, *play(request)[1:]]
    async with running(app, context, backend, drain_s=5) as server, httpx.AsyncClient() as client:
        body = {"prompt": "Hi", "stream": True}
        async with client.stream("POST", server.url + COMPLETIONS, json=body) as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            os.kill(os.getpid(), signal.SIGTERM)
            while backend.is_ready:
                await asyncio.sleep(0.01)
            while await accepts(server.url):
                await asyncio.sleep(0.01)
            assert not server.serving.done()
            gate.set()
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_drain_has_a_deadline(
    app: FastAPI,
    context: Context,
    backend: FakeBackend,
    say: Callable[[str], Script],
    stream: bool,
) -> None:
    """What is still open then is told so: a stream by an event, another answer by its status."""
    play = say("Hello world")
    backend.script = lambda request: [*play(request)[:stream], asyncio.Event()]
    async with running(app, context, backend, drain_s=0.5) as server, httpx.AsyncClient() as client:
        body = {"prompt": "Hi", "stream": stream}
        post = asyncio.create_task(client.post(server.url + COMPLETIONS, json=body))
        while not backend.streams:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        response = await asyncio.wait_for(post, 5)
        assert backend.streams[0].aborted.is_set()
    if stream:
        last = response.text.strip().rpartition("data: ")[2]
        assert json.loads(last)["error"]["code"] == "draining"
        assert response.text.startswith("data: {")
    else:
        assert error_of(response, 503)["code"] == "draining"
        assert int(response.headers["retry-after"]) >= 1


async def test_a_second_signal_ends_at_once(
    app: FastAPI, context: Context, backend: FakeBackend
) -> None:
    backend.script = lambda request: [asyncio.Event()]
    async with running(app, context, backend, drain_s=600) as server, httpx.AsyncClient() as client:
        post = asyncio.create_task(client.post(server.url + COMPLETIONS, json={"prompt": "Hi"}))
        while not backend.streams:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        while backend.is_ready:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(server.serving, 5)
        post.cancel()
        backend.streams[0].abort()
        await asyncio.gather(post, return_exceptions=True)


def test_a_taken_port_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(GatewayConfig.model_validate({"port": port, "redis_url": "unix:///none"})) == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"cannot listen on 127.0.0.1:{port}: Address already in use"


def test_a_missing_tokenizer_is_one_line(
    caplog: pytest.LogCaptureFixture, tmp_path: os.PathLike[str]
) -> None:
    assert run(GatewayConfig.model_validate({"model": str(tmp_path)})) == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert "tokenizer.json" in line


def test_what_is_written_leaves_at_once() -> None:
    with (
        listen("127.0.0.1", 0, slow_client_s=1) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
