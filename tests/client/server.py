"""An HTTP server in a thread of its own, whose answers a test decides."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Answer:
    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    # Server-sent events, each after a pause in seconds; instead of `body`.
    events: list[tuple[float, Any]] | None = None
    cut: bool = False  # the connection ends without `[DONE]`, or without an answer at all
    delay_s: float = 0.0


Decide = Callable[[str, dict[str, Any]], Answer]
MODELS = {"object": "list", "data": [{"id": "demo", "max_model_len": 1024}]}


def refusal(status: int, code: str, message: str = "no", **headers: str) -> Answer:
    return Answer({"error": {"message": message, "code": code}}, status, headers)


@dataclass
class FakeServer:
    """`decide(path, body)` answers every POST. Keeps what it was asked."""

    decide: Decide
    url: str = ""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        if request.method == "GET":
            return web.json_response(MODELS)
        body = json.loads(await request.read())
        self.requests.append((request.path, body))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            return await self._answer(request, self.decide(request.path, body))
        finally:
            self.num_open -= 1

    async def _answer(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        await asyncio.sleep(answer.delay_s)
        if answer.events is None:
            if answer.cut:
                assert request.transport is not None
                request.transport.abort()
            return web.json_response(answer.body, status=answer.status, headers=answer.headers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for pause_s, event in answer.events:
            await asyncio.sleep(pause_s)
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        if not answer.cut:
            await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def serving(decide: Decide) -> Iterator[FakeServer]:
    server, loop = FakeServer(decide), asyncio.new_event_loop()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        server.url = f"http://127.0.0.1:{port}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
