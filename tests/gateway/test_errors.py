"""Every refusal: status, OpenAI body, the field it names."""

import asyncio
import threading
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from baton.errors import BatonError, Cause, InvalidRequest
from baton.text import TokenizerPool
from tests.gateway.fakes import FakeBackend

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < 16 * 2**10
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [[1]] * 65, "n": 2}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 257}, "max_tokens"),
        ({"max_tokens": "ten"}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": -(2**62)}, "n"),
        ({"n": 129}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a"] * 10_000}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": "x" * 4097}, "stop"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"model": 7}, "model"),
        ({"priority": 2**64}, "priority"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 0}, "prompt"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"request_id": "x" * 257}, "request_id"),
        ({"request_id": 7}, "request_id"),
        ({"echo": 1}, "echo"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "2"}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(i): 0 for i in range(20_000)}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [4096]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["1"] * 100_000}, "allowed_token_ids"),
        ({"allowed_token_ids": [2**32]}, "allowed_token_ids"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"logprobs": 0, "logprob_token_ids": [4096]}, "logprob_token_ids"),
        ({"logprobs": 0, "logprob_token_ids": [1] * 129}, "logprob_token_ids"),
        ({"logprobs": 21, "echo": True}, "logprobs"),
        ({"bad_words": ["a", ""]}, "bad_words"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"bad_words": [1]}, "bad_words"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        (
            {
                "response_format": {"type": "json_object"},
                "structured_outputs": {"json_object": True},
            },
            "structured_outputs",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
                }
            },
            "response_format",
        ),
        ({"repetition_detection": {}}, "repetition_detection"),
        ({"repetition_detection": 5}, "repetition_detection"),
        ({"repetition_detection": {"max_pattern_size": 0}}, "repetition_detection"),
        (
            {"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3}},
            "repetition_detection",
        ),
        ({"repetition_detection": {"max_pattern_size": 2, "min_count": 1}}, "repetition_detection"),
        ({"spaces_between_special_tokens": "no"}, "spaces_between_special_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_completions(
    lasting_client: httpx.AsyncClient,
    lasting_backend: FakeBackend,
    fields: dict[str, Any],
    param: str,
    stream: bool,
) -> None:
    body = {"prompt": [1], "temperature": 1.0, **fields}
    if stream:
        if "stream_options" in fields:
            return
        body.setdefault("stream", True)
    error = error_of(await lasting_client.post(COMPLETIONS, json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert not lasting_backend.streams


@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        (COMPLETIONS, "suffix", "x"),
        (COMPLETIONS, "prompt_embeds", "AAAA"),
        (COMPLETIONS, "kv_transfer_params", {"do_remote_prefill": True}),
        (CHAT, "chat_template", "{{ messages }}"),
    ],
)
async def test_known_but_not_served(
    client: httpx.AsyncClient, backend: FakeBackend, url: str, name: str, value: Any
) -> None:
    body: dict[str, Any] = {"prompt": [1]} if url == COMPLETIONS else {"messages": USER}
    error = error_of(await client.post(url, json={**body, name: value}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported")
    assert name in error["message"]
    assert not backend.streams


async def test_a_field_that_asks_for_nothing_special_is_no_error(client: httpx.AsyncClient) -> None:
    neutral = {"echo": False, "suffix": None, "logit_bias": {}, "response_format": {"type": "text"}}
    response = await client.post(COMPLETIONS, json={"prompt": [1], **neutral})
    assert response.status_code == 200
    body = {"messages": USER, "tools": None, "tool_choice": "none", "parallel_tool_calls": True}
    assert (await client.post(CHAT, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{}]}, "messages"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": USER * 2049}, "messages"),
        ({"messages": [{"role": "user", "content": "x " * 300}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning_effort": "galactic"}, "reasoning_effort"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 999}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
)
async def test_bad_chats(
    lasting_client: httpx.AsyncClient,
    lasting_backend: FakeBackend,
    fields: dict[str, Any],
    param: str,
) -> None:
    error = error_of(await lasting_client.post(CHAT, json={"messages": USER, **fields}), 400)
    assert error["param"] == param
    assert not lasting_backend.streams


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [[1] * 256, [1] * 5000, "x " * 300, "x" * 100_000])
async def test_a_prompt_over_the_context(
    client: httpx.AsyncClient, backend: FakeBackend, prompt: Any, stream: bool
) -> None:
    body = {"prompt": prompt, "stream": stream}
    error = error_of(await client.post(COMPLETIONS, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert "256" in error["message"]
    assert not backend.streams


async def test_when_one_prompt_of_several_is_bad_none_is_sent(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    body = {"prompt": [[1], [1] * 300]}
    error_of(await client.post(COMPLETIONS, json=body), 400)
    assert not backend.streams


async def test_unknown_model(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"model": "nope", "prompt": "Hi"}
    error = error_of(await client.post(COMPLETIONS, json=body), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "tiny" in error["message"]
    backend.served = ()
    response = await client.post(COMPLETIONS, json=body)
    assert error_of(response, 503)["code"] == "no_worker"
    assert int(response.headers["retry-after"]) > 0


_SECRET = "10.0.0.7:9000 /srv/model"


@pytest.mark.parametrize("cause", list(Cause))
@pytest.mark.parametrize("where", ["open", "first", "first_of_stream"])
async def test_a_failure_before_the_first_token_is_a_status(
    client: httpx.AsyncClient, backend: FakeBackend, cause: Cause, where: str
) -> None:
    failure = BatonError(cause, _SECRET)
    if where == "open":
        backend.refuse = failure
    else:
        backend.script = lambda request: [failure]
    body = {"prompt": "Hi", "stream": where == "first_of_stream"}
    response = await client.post(COMPLETIONS, json=body)
    error = error_of(response, cause.http_status)
    if cause.http_status in (429, 503):
        assert int(response.headers["retry-after"]) > 0
    if cause.http_status >= 500 and not 10 <= cause < 20 and cause != Cause.DEADLINE_EXCEEDED:
        assert _SECRET not in error["message"], "details of what failed inside stay inside"
    if cause.http_status == 500:
        assert response.headers["x-request-id"] in error["message"]
    if where != "open":
        assert backend.streams[0].aborted.is_set()


async def test_a_failure_of_ours_is_a_500_without_details(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    def script(_: object) -> list[Any]:
        raise KeyError(_SECRET)

    backend.script = script
    response = await client.post(COMPLETIONS, json={"prompt": "Hi"})
    error = error_of(response, 500)
    assert error["type"] == "server_error"
    assert _SECRET not in response.text
    assert response.headers["x-request-id"] in error["message"]


async def test_a_later_prompt_that_is_refused_ends_the_earlier_ones(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    play = backend.script

    def script(request: Any) -> Any:
        if request.prompt_token_ids == (2,):
            raise InvalidRequest("no", "prompt", Cause.NEVER_FITS)
        return play(request)

    backend.script = script
    error = error_of(await client.post(COMPLETIONS, json={"prompt": [[1], [2]]}), 400)
    assert error["code"] == "never_fits"
    assert [stream.aborted.is_set() for stream in backend.streams] == [True]


async def test_when_one_prompt_of_several_fails_the_others_end(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    def script(request: Any) -> Any:
        if request.prompt_token_ids == (2,):
            return [BatonError(Cause.WORKER_LOST, "gone")]
        return [asyncio.Event()]

    backend.script = script
    body = {"prompt": [[1], [2], [3]], "stream": True}
    error_of(await client.post(COMPLETIONS, json=body), Cause.WORKER_LOST.http_status)
    assert [stream.aborted.is_set() for stream in backend.streams] == [True] * 3


async def test_too_many_prompts_waiting_for_the_tokenizer(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    pool: TokenizerPool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()

    def encode(text: str, **_: Any) -> list[int]:
        assert go_on.wait(10)
        return [1]

    monkeypatch.setattr(pool.tokenizer, "encode", encode)
    try:  # the fixture's pool takes 64
        response = await client.post(COMPLETIONS, json={"prompt": ["a"] * 65})
    finally:
        go_on.set()
    assert error_of(response, 429)["type"] == "rate_limit_exceeded"
    assert int(response.headers["retry-after"]) > 0
    assert not backend.streams


async def test_routes(client: httpx.AsyncClient) -> None:
    for url in ("/", "/nope", "/v1/completions/", "/v1/models/"):
        assert error_of(await client.get(url), 404)["code"] == "unknown_url"
    for method, url, allowed in (
        ("GET", COMPLETIONS, "POST"),
        ("DELETE", CHAT, "POST"),
        ("POST", "/v1/models", "GET"),
        ("POST", "/v1/cluster", "GET"),
    ):
        response = await client.request(method, url)
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == allowed


async def test_a_wrong_method_names_every_right_one(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    paths = {path: set(methods) for path, methods in app.openapi()["paths"].items()}
    for path, methods in (paths | {"/ping": {"get", "post"}}).items():
        response = await client.request("TRACE", path)
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert set(response.headers["allow"].lower().split(", ")) == methods
