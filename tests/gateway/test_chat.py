"""/v1/chat/completions: template, messages, shapes of whole and streamed answers."""

from typing import Any

import httpx
import pytest

from baton.text import Tokenizer
from tests.gateway.fakes import FakeBackend, chunks
from tests.gateway.test_completions import events

URL = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


async def test_whole_answer(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    response = await client.post(URL, json={"model": "tiny", "messages": MESSAGES})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Hello world",
            **dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning")),
        },
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        **dict.fromkeys(("token_ids", "routed_experts", "weight_versions")),
    }
    nulls = ("prompt_logprobs", "prompt_token_ids", "prompt_text", "service_tier", "metrics")
    for name in (*nulls, "kv_transfer_params", "ec_transfer_params"):
        assert body[name] is None, name
    request = backend.request
    assert list(request.prompt_token_ids) == tokenizer.encode_chat(MESSAGES)
    room = 256 - len(request.prompt_token_ids)
    assert request.sampling.max_tokens == room
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_stream(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"messages": MESSAGES, "n": 2, "stream": True, "return_token_ids": True}
    body["stream_options"] = {"include_usage": True}
    *stream, last = events(await client.post(URL, json=body))
    assert last["choices"] == []
    assert {event["object"] for event in stream} == {"chat.completion.chunk"}
    for index in range(2):
        mine = [e for e in stream if e["choices"][0]["index"] == index]
        deltas = [event["choices"][0]["delta"] for event in mine]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all(delta.keys() == {"content"} for delta in deltas[1:])
        assert "".join(delta["content"] for delta in deltas) == "Hello world"
        assert mine[0]["prompt_token_ids"] == list(backend.request.prompt_token_ids)
        reasons = [event["choices"][0]["finish_reason"] for event in mine]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]


async def test_logprobs(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("é👩", add_special_tokens=False)
    backend.script = lambda request: chunks(request, ids, per_chunk=2)
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    (choice,) = (await client.post(URL, json=body)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "é👩"
    assert [entry["logprob"] for entry in content] == [-0.5] * len(ids)
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(ids)
    assert content[0]["top_logprobs"][0] == {
        key: content[0][key] for key in ("token", "logprob", "bytes")
    }
    stream = events(await client.post(URL, json={**body, "stream": True}))
    streamed = [
        entry
        for event in stream
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ({}, {}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        (
            {"continue_final_message": True},
            {"add_generation_prompt": False, "continue_final_message": True},
        ),
        ({"chat_template_kwargs": {"unused": 1}, "reasoning_effort": "low"}, {}),
    ],
)
async def test_template_options(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    tokenizer: Tokenizer,
    extra: dict[str, Any],
    options: dict[str, Any],
) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Well"},
    ]
    response = await client.post(URL, json={"messages": messages, **extra})
    assert response.status_code == 200, response.text
    expected = tokenizer.encode_chat(messages, **options)
    assert list(backend.request.prompt_token_ids) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_completion_tokens": None}, None),
    ],
)
async def test_max_tokens(
    client: httpx.AsyncClient, backend: FakeBackend, given: dict[str, Any], expected: int | None
) -> None:
    assert (await client.post(URL, json={"messages": MESSAGES, **given})).status_code == 200
    room = 256 - len(backend.request.prompt_token_ids)
    assert backend.request.sampling.max_tokens == (room if expected is None else expected)
