"""An application around a scripted backend, and a real server for contract tests."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
import uvloop
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

import baton
from baton.gateway.app import create_app
from baton.gateway.backend import ServedModel
from baton.gateway.context import Context
from baton.gateway.defaults import SamplingDefaults
from baton.gateway.protocol import http_protocol
from baton.settings import GatewaySettings, LimitSettings
from baton.telemetry import GatewayMetrics
from baton.text import Tokenizer, TokenizerPool
from baton.types import Request
from baton.vllm_metrics import VllmMetrics
from tests.gateway.fakes import FakeBackend, Script, Step, chunks


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """As in production."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(str(Path(baton.__file__).parent / "demo_model"))


@pytest.fixture
def pool(tokenizer: Tokenizer) -> Iterator[TokenizerPool]:
    pool = TokenizerPool(tokenizer, num_threads=1, max_pending=64)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        "tiny", max_model_len=256, vocab_size=4096, eos_token_ids=tokenizer.eos_token_ids
    )


@pytest.fixture(scope="session")
def say(tokenizer: Tokenizer) -> Callable[[str], Script]:
    """say(text): every choice of every request gets the tokens of `text`, one per chunk."""

    def make(text: str) -> Script:
        ids = tokenizer.encode(text, add_special_tokens=False)

        def script(request: Request) -> list[Step]:
            keep = ids[: request.sampling.max_tokens]
            return [
                chunk
                for choice in range(request.sampling.n)
                for chunk in chunks(request, keep, choice=choice)
            ]

        return script

    return make


@pytest.fixture
def backend(model: ServedModel, say: Callable[[str], Script]) -> FakeBackend:
    return FakeBackend(say("Hello world"), (model,))


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings.model_validate({})


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings()


@pytest.fixture
def context(
    backend: FakeBackend, pool: TokenizerPool, settings: GatewaySettings, limits: LimitSettings
) -> Context:
    return make_context(backend, pool, settings, limits)


def make_context(
    backend: FakeBackend, pool: TokenizerPool, settings: GatewaySettings, limits: LimitSettings
) -> Context:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, VllmMetrics(registry))
    defaults = SamplingDefaults.load(settings, pool.tokenizer)
    return Context(backend, pool, settings, metrics, limits, defaults)


@pytest.fixture
def app(context: Context) -> FastAPI:
    return create_app(context)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with _client_of(app) as client:
        yield client


def _client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


@pytest.fixture(scope="module")
def lasting_backend(model: ServedModel, say: Callable[[str], Script]) -> FakeBackend:
    return FakeBackend(say("Hello world"), (model,))


@pytest.fixture(scope="module")
def lasting_app(tokenizer: Tokenizer, lasting_backend: FakeBackend) -> Iterator[FastAPI]:
    pool = TokenizerPool(tokenizer, num_threads=1, max_pending=64)
    settings = GatewaySettings.model_validate({})
    yield create_app(make_context(lasting_backend, pool, settings, LimitSettings()))
    pool.close()


@pytest.fixture
async def lasting_client(lasting_app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Of one application for all requests of a module that are refused as they come: to make the
    routes of one takes longer than fifty refusals."""
    async with _client_of(lasting_app) as client:
        yield client


@pytest.fixture
async def server(app: FastAPI, limits: LimitSettings) -> AsyncIterator[str]:
    """The application behind a real uvicorn; gives "host:port"."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", http=http_protocol(limits), ws="none")
    uvicorn_server = uvicorn.Server(config)
    running = asyncio.create_task(uvicorn_server._serve([listener]))
    while not uvicorn_server.started:
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()
    yield f"{host}:{port}"
    uvicorn_server.should_exit = True
    await running
