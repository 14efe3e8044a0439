"""/v1/responses: the official client as judge of shapes and of the order of events."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from baton.errors import BatonError, Cause
from baton.gateway.app import create_app
from baton.gateway.context import Context
from baton.text import Tokenizer
from baton.types import FinishReason, StructuredKind
from tests.conftest import RedisServer, Until
from tests.gateway.fakes import FakeBackend, chunks
from tests.gateway.responses.support import (
    ARGUMENTS,
    BODY,
    CALL,
    KEYS,
    LOGPROBS,
    SCHEMA,
    TOOL,
    URL,
    MakeService,
    client_of,
    created,
    error_of,
)
from tests.gateway.test_messages import events

ALLOWED = {
    "type": "allowed_tools",
    "mode": "auto",
    "tools": [{"type": "function", "name": "x"}],
}

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


async def test_items_of_earlier_responses(
    client: httpx.AsyncClient, app: FastAPI, answer: Any, backend: FakeBackend
) -> None:
    answer(f"Look: {CALL}")
    first = await created(client, tools=[TOOL])
    result = {
        "type": "function_call_output",
        "call_id": first["output"][-1]["call_id"],
        "output": "9",
    }
    question = {"role": "user", "content": "Hi"}
    await created(client, input=[question, *first["output"], result])
    seen = backend.request.prompt_token_ids
    referred = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    body = {"input": [question, *referred, result], "store": False}
    await created(client, **body)
    assert backend.request.prompt_token_ids == seen
    unknown = {"type": "item_reference", "id": first["output"][0]["id"] + "7"}
    error = error_of(await client.post(URL, json=BODY | {"input": [unknown]}), 404)
    assert (error["param"], error["code"]) == ("input", "response_not_found")
    async with client_of(app, "bob") as other:
        error_of(await other.post(URL, json=BODY | body), 404)


@pytest.mark.parametrize("status", ["in_progress", "incomplete", "completed"])
async def test_an_unfinished_message_is_continued(
    client: httpx.AsyncClient, backend: FakeBackend, status: str
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    fields = {} if status == "completed" else {"continue_final_message": True}
    if fields:
        fields["add_generation_prompt"] = False
    await client.post("/v1/chat/completions", json={"messages": messages, **fields})
    expected = backend.request.prompt_token_ids
    part = {"type": "output_text", "text": "Hel"}
    begun = {"type": "message", "role": "assistant", "status": status, "content": [part]}
    await created(client, input=[messages[0], begun])
    assert backend.request.prompt_token_ids == expected


async def test_some_tools_are_allowed(
    client: httpx.AsyncClient, answer: Any, backend: FakeBackend
) -> None:
    answer(f'[{{"name": "weather", "parameters": {ARGUMENTS}}}]')
    now = {"type": "function", "name": "now", "parameters": {"type": "object"}}
    named = [{"type": "function", "name": "weather"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": named}
    response = await created(client, tools=[TOOL, now], tool_choice=choice)
    assert response["tool_choice"] == choice
    assert [item["name"] for item in response["output"]] == ["weather"]
    spec = backend.request.sampling.structured_outputs
    assert spec is not None
    calls = json.loads(spec.text)["items"]["anyOf"]
    assert [call["properties"]["name"]["const"] for call in calls] == ["weather"]


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
        ({"input": [{"type": "item_reference"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input"),
        ({"input": "x " * 5000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 9999}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"reasoning": {"effort": "galactic"}}, "reasoning"),
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
        ({"tools": [TOOL], "tool_choice": ALLOWED | {"tools": []}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": ALLOWED | {"mode": "none"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": ALLOWED}, "tool_choice"),
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
