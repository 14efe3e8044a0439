"""Apps that answer /v1/responses, and their clients."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from baton.errors import BatonError, Cause
from baton.gateway.app import create_app
from baton.gateway.context import Context
from baton.gateway.responses.service import ResponseService
from baton.gateway.responses.store import ResponseStore
from baton.settings import GatewaySettings
from baton.text import Tokenizer
from baton.types import FinishReason
from tests.conftest import RedisServer
from tests.gateway.fakes import FakeBackend, chunks
from tests.gateway.responses.support import KEYS, MakeService, client_of


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(
        api_key=KEYS,
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    )


@pytest.fixture
async def make_service(redis_server: RedisServer, context: Context) -> AsyncIterator[MakeService]:
    made: list[ResponseService] = []

    def make(*, ttl_s: float = 60, max_bytes: int = 1 << 20, runs: int = 4) -> ResponseService:
        store = ResponseStore(
            redis_server.url, "c", ["t"], ttl_s=ttl_s, max_bytes=max_bytes, max_item_bytes=1 << 18
        )
        made.append(ResponseService(store, max_background=runs))
        return made[-1]

    yield make
    context.inflight.fail_all(BatonError(Cause.DRAINING, "over"))
    for service in made:
        await service.close()


@pytest.fixture
def service(make_service: MakeService) -> ResponseService:
    return make_service()


@pytest.fixture
def app(context: Context, service: ResponseService) -> FastAPI:
    return create_app(context, responses=service)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


@pytest.fixture
async def api(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{server}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="alice", max_retries=0) as client:
        yield client


@pytest.fixture
def answer(backend: FakeBackend, tokenizer: Tokenizer) -> Any:
    """Makes the model say that, and stop; a gate holds it up before its last token."""

    def say(
        text: str, finish: FinishReason = FinishReason.STOP, gate: asyncio.Event | None = None
    ) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)

        def script(request: Any) -> list[Any]:
            steps: list[Any] = chunks(request, ids, finish=finish)
            return steps if gate is None else [*steps[:-1], gate, steps[-1]]

        backend.script = script

    return say
