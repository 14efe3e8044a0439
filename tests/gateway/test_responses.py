"""/v1/responses: the official client as judge of shapes and of the order of events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from baton.errors import BatonError, Cause
from baton.gateway.app import create_app
from baton.gateway.context import Context
from baton.gateway.responses.service import ResponseService
from baton.gateway.responses.store import ResponseStore
from baton.settings import GatewaySettings
from baton.telemetry import GatewayMetrics
from baton.text import Tokenizer
from baton.types import FinishReason, StructuredKind
from tests.conftest import RedisServer, Until
from tests.gateway.fakes import FakeBackend, chunks
from tests.gateway.test_messages import events

URL = "/v1/responses"
BODY = {"model": "tiny", "input": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}
ARGUMENTS = '{"city": "Bern"}'
CALL = f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>'
LOGPROBS = "message.output_text.logprobs"
KEYS = ("alice", "bob")
MakeService = Callable[..., ResponseService]


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


def another(context: Context, service: ResponseService) -> FastAPI:
    """A gateway beside the first one."""
    metrics = GatewayMetrics(CollectorRegistry())
    return create_app(replace(context, metrics=metrics), responses=service)


def client_of(app: FastAPI, key: str = "alice") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


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


async def created(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json=BODY | fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return dict(response.json()["error"])


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


async def test_whole(api: openai.AsyncOpenAI, answer: Any) -> None:
    answer("<think>Hm.</think>Hello")
    response = await api.responses.create(
        model="tiny", input="Hi", metadata={"a": "b"}, instructions="Be brief."
    )
    assert response.id.startswith("resp_")
    assert (response.status, response.output_text) == ("completed", "Hello")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "Hm."
    assert response.metadata == {"a": "b"}
    assert response.instructions == "Be brief."
    usage = response.usage
    assert usage is not None
    assert usage.input_tokens_details.cached_tokens == 2
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


async def test_a_whole_answer_and_a_stream_say_the_same(
    api: openai.AsyncOpenAI, answer: Any
) -> None:
    answer(f"<think>Hm.</think>Look: {CALL}")
    arguments: Any = {"model": "tiny", "input": "Hi", "tools": [TOOL]}
    whole = await api.responses.create(**arguments)
    async with api.responses.stream(**arguments) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.usage == whole.usage
    ours = [item.model_dump(exclude={"id", "call_id", "parsed_arguments"}) for item in final.output]
    theirs = [item.model_dump(exclude={"id", "call_id"}) for item in whole.output]
    assert [item["type"] for item in ours] == ["reasoning", "message", "function_call"]
    assert json.loads(json.dumps(ours, default=str))[2]["arguments"] == ARGUMENTS
    assert [item["type"] for item in theirs] == [item["type"] for item in ours]
    assert theirs[2]["arguments"] == ARGUMENTS
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"


async def test_order_of_events(client: httpx.AsyncClient, answer: Any) -> None:
    answer(f"<think>Hm.</think>Look: {CALL}")
    response = await client.post(URL, json=BODY | {"stream": True, "tools": [TOOL]})
    found = events(response)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    compressed = [kind for at, kind in enumerate(kinds) if not at or kinds[at - 1] != kind]
    text_item = ["output_item.added", "content_part.added", "{}.delta", "{}.done"]
    text_item += ["content_part.done", "output_item.done"]
    assert compressed == [
        "created",
        "in_progress",
        *[kind.format("reasoning_text") for kind in text_item],
        *[kind.format("output_text") for kind in text_item],
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    last = found[-1]["response"]
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert last["output"] == done
    assert all(item["status"] == "completed" for item in done)
    for event in found:
        if "item_id" in event:
            assert event["item_id"] == done[event["output_index"]]["id"]


async def test_incomplete(client: httpx.AsyncClient, answer: Any, backend: FakeBackend) -> None:
    answer("Hello", FinishReason.LENGTH)
    response = await created(client, max_output_tokens=5)
    assert backend.request.sampling.max_tokens == 5
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][-1]["status"] == "incomplete"
    found = events(await client.post(URL, json=BODY | {"stream": True}))
    assert found[-1]["type"] == "response.incomplete"


async def test_logprobs_are_of_content(client: httpx.AsyncClient, answer: Any) -> None:
    answer("<think>Hm.</think>Hello world")
    fields = {"include": [LOGPROBS], "top_logprobs": 2}
    response = await created(client, **fields)
    (part,) = response["output"][1]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]).endswith("Hello world")
    assert len(part["logprobs"]) < response["usage"]["output_tokens"]
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {2}
    found = events(await client.post(URL, json=BODY | fields | {"stream": True}))
    streamed = [
        entry
        for event in found
        if event["type"] == "response.output_text.delta"
        for entry in event["logprobs"]
    ]
    assert streamed == part["logprobs"]


async def test_structured_text(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    form = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    response = await created(client, text={"format": form})
    assert response["text"]["format"] == form
    spec = backend.request.sampling.structured_outputs
    assert spec is not None
    assert spec.kind is StructuredKind.JSON_SCHEMA
    bad = {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}
    assert error_of(await client.post(URL, json=BODY | {"text": {"format": bad}}), 400)[
        "param"
    ] == ("text")


async def test_fields_reach_the_worker(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await created(client, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop=["x"], ignore_eos=True)
    sampling = backend.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (3, ("x",), True)


async def test_a_failure_in_the_middle_is_response_failed(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    error = BatonError(Cause.WORKER_LOST, "gone")
    backend.script = lambda request: [*chunks(request, ids, finish=None), error]
    last = events(await client.post(URL, json=BODY | {"stream": True}))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    backend.script = lambda request: [error]
    assert error_of(await client.post(URL, json=BODY | {"stream": True}), 503)["code"]


# ── the conversation ─────────────────────────────────────────────────────────────────────────────


async def test_items_and_a_chat_are_the_same_prompt(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Or not."},
        {"role": "user", "content": "Warm\n?"},
        {"role": "assistant", "content": "Look: ", "reasoning": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "9"},
    ]
    await client.post("/v1/chat/completions", json={"messages": chat})
    expected = backend.request.prompt_token_ids
    items = [
        {"role": "developer", "content": "Or not."},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Warm"},
                {"type": "input_text", "text": "?"},
            ],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [_part("reasoning_text")]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Look: ", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "c1", "output": "9"},
    ]
    await created(client, instructions="Be brief.", input=items)
    assert backend.request.prompt_token_ids == expected


def _part(kind: str) -> dict[str, str]:
    return {"type": kind, "text": "Hm."}


async def test_a_conversation_goes_on(
    client: httpx.AsyncClient, answer: Any, backend: FakeBackend
) -> None:
    answer(f"Look: {CALL}")
    first = await created(client, instructions="Be brief.", tools=[TOOL])
    call = first["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "9"}
    second = await created(client, previous_response_id=first["id"], input=[result])
    assert second["previous_response_id"] == first["id"]
    by_hand = [{"role": "user", "content": "Hi"}, *first["output"], result]
    seen = backend.request.prompt_token_ids
    await created(client, input=by_hand)
    assert backend.request.prompt_token_ids == seen  # the instructions are gone
    await created(client, previous_response_id=second["id"], input="Thanks")
    assert len(backend.request.prompt_token_ids) > len(seen)


@pytest.mark.parametrize("key", KEYS)
async def test_stored_for_one_key(app: FastAPI, client: httpx.AsyncClient, key: str) -> None:
    response = await created(client)
    assert response["store"]
    async with client_of(app, key) as other:
        path = f"{URL}/{response['id']}"
        if key == "alice":
            assert (await other.get(path)).json() == response
            assert (await other.delete(path)).json()["deleted"]
            key = "deleted"
        for found in (
            await other.get(path),
            await other.delete(path),
            await other.post(f"{path}/cancel"),
            await other.post(URL, json=BODY | {"previous_response_id": response["id"]}),
        ):
            error = error_of(found, 404)
            assert error["code"] == "response_not_found"
        assert error["param"] == "previous_response_id"
    status = (await client.get(path)).status_code
    assert status == (404 if key == "deleted" else 200)


async def test_not_stored(client: httpx.AsyncClient) -> None:
    response = await created(client, store=False)
    assert not response["store"]
    error_of(await client.get(f"{URL}/{response['id']}"), 404)


async def test_ids_that_are_none(client: httpx.AsyncClient) -> None:
    for name in ("x", "resp_", "resp_" + "0" * 32, "resp_*", "resp_%0a", "resp_" + "a" * 5000):
        assert error_of(await client.get(f"{URL}/{name}"), 404)["type"] == "invalid_request_error"


async def test_expiry(context: Context, make_service: MakeService, until: Until) -> None:
    app = create_app(context, responses=make_service(ttl_s=0.5))
    async with client_of(app) as client:
        response = await created(client)
        path = f"{URL}/{response['id']}"
        assert (await client.get(path)).status_code == 200
        await asyncio.sleep(0.6)
        assert (await client.get(path)).status_code == 404


async def test_the_oldest_make_room(context: Context, make_service: MakeService) -> None:
    app = create_app(context, responses=make_service(max_bytes=16 << 10))
    async with client_of(app) as client, client_of(app, "bob") as other:
        theirs = await created(other)
        ids = [(await created(client, user="x" * 3000))["id"] for _ in range(6)]
        there = [(await client.get(f"{URL}/{name}")).status_code == 200 for name in ids]
        assert there == sorted(there)
        assert there[-1]
        assert not there[0]
        assert (await other.get(f"{URL}/{theirs['id']}")).status_code == 200


async def test_too_large_to_store(client: httpx.AsyncClient) -> None:
    metadata = {str(key): "x" * 512 for key in range(16)}
    response = await created(client, user="x" * (1 << 18), metadata=metadata)
    assert not response["store"]
    large = BODY | {"user": "x" * (1 << 18), "background": True}
    assert error_of(await client.post(URL, json=large), 400)["param"] == "input"


async def test_without_redis(
    client: httpx.AsyncClient, redis_server: RedisServer, answer: Any
) -> None:
    before = await created(client)
    redis_server.kill()
    assert not (await created(client))["store"]
    found = events(await client.post(URL, json=BODY | {"stream": True}))
    assert not found[-1]["response"]["store"]
    for fields in ({"store": True}, {"background": True}, {"previous_response_id": before["id"]}):
        response = await client.post(URL, json=BODY | fields)
        assert error_of(response, 503)["code"] == "response_store_unavailable"
        assert response.headers["Retry-After"]
    error_of(await client.get(f"{URL}/{before['id']}"), 503)


# ── in the background ────────────────────────────────────────────────────────────────────────────


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


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{}]}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": 3}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input"),
        ({"input": "x " * 5000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 9999}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 30, "include": [LOGPROBS]}, "top_logprobs"),
        ({"include": ["everything"]}, "include"),
        ({"text": {"format": {"type": "poem"}}}, "text"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"metadata": {"x": "y" * 513}}, "metadata"),
        ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
        ({"truncation": "some"}, "truncation"),
        ({"background": True, "store": False}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"conversation": "x"}, "conversation"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"previous_response_id": 3}, "previous_response_id"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(URL, json=BODY | fields), 400)
    assert error["param"] == param
    assert error["message"]


async def test_no_store_is_configured(context: Context) -> None:
    async with client_of(create_app(context)) as client:
        response = await created(client)
        assert not response["store"]
        error_of(await client.get(f"{URL}/{response['id']}"), 404)
        for name in ("store", "background"):
            assert error_of(await client.post(URL, json=BODY | {name: True}), 400)["param"] == name
