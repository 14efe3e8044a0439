"""/v1/responses in the background: streamed again, cancelled, and left behind by a gateway."""

import asyncio
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis

from baton.gateway.app import create_app
from baton.gateway.context import Context
from tests.conftest import RedisServer, Until
from tests.gateway.fakes import FakeBackend
from tests.gateway.responses.support import (
    BODY,
    URL,
    MakeService,
    another,
    client_of,
    created,
    error_of,
)
from tests.gateway.test_messages import events


async def test_background(api: openai.AsyncOpenAI, answer: Any) -> None:
    gate = asyncio.Event()
    answer("Hello world", gate=gate)
    response = await api.responses.create(model="tiny", input="Hi", background=True)
    assert response.status == "queued"
    while response.status == "queued":
        response = await api.responses.retrieve(response.id)
    assert response.status == "in_progress"
    gate.set()
    while response.status == "in_progress":
        response = await api.responses.retrieve(response.id)
    assert (response.status, response.output_text) == ("completed", "Hello world")
    again = [e async for e in await api.responses.retrieve(response.id, stream=True)]
    assert [event.sequence_number for event in again] == list(range(len(again)))
    assert [event.type for event in again[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert again[-1].response == response
    rest = await api.responses.retrieve(response.id, stream=True, starting_after=4)
    assert [event async for event in rest] == again[5:]


async def test_background_stream_outlives_its_client(
    api: openai.AsyncOpenAI, answer: Any, backend: FakeBackend
) -> None:
    gate = asyncio.Event()
    answer("Hello world", gate=gate)
    stream = await api.responses.create(model="tiny", input="Hi", background=True, stream=True)
    async for event in stream:
        if event.type == "response.created":
            response_id = event.response.id
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    assert not backend.streams[-1].aborted.is_set()
    gate.set()
    rest = await api.responses.retrieve(
        response_id, stream=True, starting_after=event.sequence_number
    )
    found = [later async for later in rest]
    assert found[0].sequence_number == event.sequence_number + 1
    assert found[-1].response.output_text == "Hello world"


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("how", ["cancel", "delete"])
async def test_cancel_frees_the_workers(
    app: FastAPI,
    context: Context,
    make_service: MakeService,
    answer: Any,
    backend: FakeBackend,
    until: Until,
    elsewhere: bool,
    how: str,
) -> None:
    answer("Hello world", gate=asyncio.Event())
    asked = another(context, make_service()) if elsewhere else app
    async with client_of(app) as client, client_of(asked) as other:
        response = await created(client, background=True)
        path = f"{URL}/{response['id']}"
        await until(lambda: backend.streams)
        if how == "delete":
            assert (await other.delete(path)).status_code == 200
            await until(backend.streams[-1].aborted.is_set)
            await until(lambda: not len(context.inflight))
            await asyncio.sleep(0.1)
            error_of(await client.get(path), 404)
            return
        cancelled = await other.post(f"{path}/cancel")
        assert cancelled.status_code == 200, cancelled.text
        assert cancelled.json()["status"] == "cancelled"
        assert backend.streams[-1].aborted.is_set()
        assert (await other.post(f"{path}/cancel")).json() == cancelled.json()
        found = events(await client.get(path, params={"stream": True}))
        assert found[-1]["response"]["status"] == "cancelled"
        assert not len(context.inflight)


async def test_only_background_is_cancelled(client: httpx.AsyncClient) -> None:
    path = f"{URL}/{(await created(client))['id']}"
    error_of(await client.post(f"{path}/cancel"), 400)
    assert error_of(await client.get(path, params={"stream": "true"}), 400)["param"] == "stream"


async def test_a_failure_in_the_background(client: httpx.AsyncClient, until: Until) -> None:
    response = await created(client, background=True, input="x " * 5000)
    path = f"{URL}/{response['id']}"
    while (found := (await client.get(path)).json())["status"] != "failed":
        await asyncio.sleep(0.02)
    assert found["error"]["code"] == "invalid_prompt"
    assert events(await client.get(path, params={"stream": True}))[-1]["response"] == found


async def test_a_gateway_that_is_gone(
    client: httpx.AsyncClient,
    context: Context,
    make_service: MakeService,
    answer: Any,
    redis_server: RedisServer,
) -> None:
    answer("Hello world", gate=asyncio.Event())
    response = await created(client, background=True)
    path = f"{URL}/{response['id']}"
    other = another(context, make_service())
    async with client_of(other) as elsewhere:
        assert (await elsewhere.get(path)).json()["status"] in ("queued", "in_progress")
        async with Redis.from_url(redis_server.url) as redis:
            for key in [key async for key in redis.scan_iter("baton:1:c:g:*")]:
                await redis.delete(key)
            found = (await elsewhere.get(path)).json()
        assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
    await client.delete(path)


async def test_background_is_bounded(
    context: Context, make_service: MakeService, answer: Any
) -> None:
    answer("Hello world", gate=asyncio.Event())
    app = create_app(context, responses=make_service(runs=1))
    async with client_of(app) as client:
        first = await created(client, background=True)
        error_of(await client.post(URL, json=BODY | {"background": True}), 429)
        await client.post(f"{URL}/{first['id']}/cancel")
        last = await created(client, background=True)
        await client.delete(f"{URL}/{last['id']}")
