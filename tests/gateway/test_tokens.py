"""/tokenize, /detokenize, /inference/v1/generate, the render routes, /invocations, /load."""

import asyncio
from typing import Any

import httpx
import pytest

from baton.errors import BatonError, Cause
from baton.text import Tokenizer
from baton.types import FinishReason
from tests.gateway.fakes import FakeBackend, chunks
from tests.gateway.test_completions import events, said
from tests.gateway.test_errors import CHAT, COMPLETIONS, USER, error_of

GENERATE = "/inference/v1/generate"


class TestTokenize:
    @pytest.mark.parametrize("adds", [None, False, True])
    async def test_a_text(
        self, client: httpx.AsyncClient, tokenizer: Tokenizer, adds: bool | None
    ) -> None:
        body = {"prompt": "one two", "add_special_tokens": adds}
        answer = (await client.post("/tokenize", json=body)).json()
        ids = tokenizer.encode("one two", add_special_tokens=adds is not False)
        assert answer == {
            "count": len(ids),
            "max_model_len": 256,
            "tokens": ids,
            "token_strs": None,
        }

    async def test_a_chat(self, client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
        body: dict[str, Any] = {"model": "tiny", "messages": USER, "return_token_strs": True}
        answer = (await client.post("/tokenize", json=body)).json()
        assert answer["tokens"] == tokenizer.encode_chat(USER)
        assert "".join(answer["token_strs"]) == tokenizer.render_chat(USER)
        body["add_generation_prompt"] = False
        answer = (await client.post("/tokenize", json=body)).json()
        assert answer["tokens"] == tokenizer.encode_chat(USER, add_generation_prompt=False)

    async def test_longer_than_the_model(self, client: httpx.AsyncClient) -> None:
        answer = (await client.post("/tokenize", json={"prompt": "x " * 10_000})).json()
        assert answer["count"] > 256
        assert (await client.post("/tokenize", json={"prompt": ""})).status_code == 200

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "prompt"),
            ({"prompt": "a", "messages": USER}, "prompt"),
            ({"prompt": [1]}, "prompt"),
            ({"messages": [{"content": "x"}]}, "messages"),
            ({"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template"),
        ],
    )
    async def test_refused(
        self, client: httpx.AsyncClient, body: dict[str, Any], param: str
    ) -> None:
        assert error_of(await client.post("/tokenize", json=body), 400)["param"] == param

    async def test_of_another_model(self, client: httpx.AsyncClient) -> None:
        for url, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            error_of(await client.post(url, json={**fields, "model": "nope"}), 404)


class TestDetokenize:
    async def test_special_tokens_are_kept(
        self, client: httpx.AsyncClient, tokenizer: Tokenizer
    ) -> None:
        ids = tokenizer.encode_chat(USER)
        answer = (await client.post("/detokenize", json={"tokens": ids})).json()
        assert answer == {"prompt": tokenizer.render_chat(USER)}

    async def test_ids_out_of_the_vocabulary_add_nothing(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/detokenize", json={"tokens": [10**9]})
        assert response.json() == {"prompt": ""}

    @pytest.mark.parametrize("tokens", [None, "x", [-1], [1.5], [True], ["1"], [2**70]])
    async def test_refused(self, client: httpx.AsyncClient, tokens: Any) -> None:
        response = await client.post("/detokenize", json={"tokens": tokens})
        assert error_of(response, 400)["param"] == "tokens"


class TestGenerate:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_ids_in_ids_out(
        self, client: httpx.AsyncClient, backend: FakeBackend, stream: bool
    ) -> None:
        body = {
            "token_ids": [5, 6, 7],
            "sampling_params": {"n": 2, "max_tokens": 9, "logprobs": 1, "seed": 3},
            "request_id": "mine",
            "stream": stream,
        }
        response = await client.post(GENERATE, json=body)
        found: dict[int, list[int]] = {}
        answers = events(response) if stream else [response.json()]
        for answer in answers:
            assert answer["request_id"] == "mine"
            for choice in answer["choices"]:
                found.setdefault(choice["index"], []).extend(choice["token_ids"])
                assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
        assert found == dict.fromkeys(range(2), said(backend)[: len(found[0])])
        assert backend.request.prompt_token_ids == (5, 6, 7)
        sampling = backend.request.sampling
        assert (sampling.n, sampling.max_tokens, sampling.seed) == (2, 9, 3)
        assert answers[-1]["choices"][-1]["finish_reason"] == "length"

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "token_ids"),
            ({"token_ids": []}, "token_ids"),
            ({"token_ids": [4096]}, "token_ids"),
            ({"token_ids": [1] * 256}, "token_ids"),
            ({"token_ids": [1], "sampling_params": 5}, "sampling_params"),
            ({"token_ids": [1], "sampling_params": {"top_p": 2}}, "top_p"),
            ({"token_ids": [1], "sampling_params": {"max_tokens": 257}}, "max_tokens"),
            ({"token_ids": [1], "stream_options": {}}, "stream_options"),
        ],
    )
    async def test_refused(
        self, client: httpx.AsyncClient, body: dict[str, Any], param: str
    ) -> None:
        assert error_of(await client.post(GENERATE, json=body), 400)["param"] == param


class TestRender:
    """What is rendered and then generated is what the endpoint itself would have asked for."""

    FIELDS: dict[str, Any] = {  # noqa: RUF012
        "n": 2,
        "temperature": 0.5,
        "seed": 11,
        "max_tokens": 9,
        "stop": "x",
        "logit_bias": {"5": 2.5},
        "repetition_detection": {"max_pattern_size": 3},
        "bad_words": ["no"],
        "structured_outputs": {"choice": ["yes", "no"], "disable_any_whitespace": False},
        "cache_salt": "s",
        "priority": 4,
    }

    async def test_a_completion(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        body = {"prompt": ["Hi", "you there"], **self.FIELDS}
        await client.post(COMPLETIONS, json=body)
        direct = [stream.request for stream in backend.streams]
        backend.streams.clear()
        rendered = (await client.post(COMPLETIONS + "/render", json=body)).json()
        assert not backend.streams, "rendering asks no worker"
        for request in rendered:
            assert (await client.post(GENERATE, json=request)).status_code == 200
        for expected, stream in zip(direct, backend.streams, strict=True):
            for name in ("prompt_token_ids", "sampling", "salt", "priority"):
                assert getattr(stream.request, name) == getattr(expected, name), name

    async def test_a_chat(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        body = {"messages": USER, **self.FIELDS}
        await client.post(CHAT, json=body)
        expected = backend.request
        rendered = (await client.post(CHAT + "/render", json=body)).json()
        await client.post(GENERATE, json=rendered)
        assert backend.request.prompt_token_ids == expected.prompt_token_ids
        assert backend.request.sampling == expected.sampling

    async def test_refuses_what_the_endpoint_refuses(
        self, client: httpx.AsyncClient, context: Any
    ) -> None:
        for body in ({"prompt": [1] * 300}, {"prompt": [4096]}, {"prompt": "x", "n": 0}):
            direct = error_of(await client.post(COMPLETIONS, json=body), 400)
            rendered = error_of(await client.post(COMPLETIONS + "/render", json=body), 400)
            assert rendered == direct
        assert len(context.inflight) == 0


class TestInvocations:
    async def test_the_shape_decides(self, client: httpx.AsyncClient) -> None:
        completion = await client.post("/invocations", json={"prompt": "Hi"})
        assert completion.json()["object"] == "text_completion"
        chat = await client.post("/invocations", json={"messages": USER})
        assert chat.json()["object"] == "chat.completion"
        stream = await client.post("/invocations", json={"prompt": "Hi", "stream": True})
        assert events(stream)

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, None),
            ([], None),
            ({"prompt": "Hi", "max_tokens": "x"}, "max_tokens"),
            ({"messages": 5}, "messages"),
            ({"messages": USER, "tools": [1]}, "tools"),
        ],
    )
    async def test_refused(self, client: httpx.AsyncClient, body: Any, param: str | None) -> None:
        assert error_of(await client.post("/invocations", json=body), 400)["param"] == param


async def test_load(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    gate = asyncio.Event()
    play = backend.script
    backend.script = lambda request: [gate, *play(request)]
    posts = [asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "a"})) for _ in range(3)]
    while len(backend.streams) < 3:
        await asyncio.sleep(0)
    assert (await client.get("/load")).json() == {"server_load": 3}
    gate.set()
    await asyncio.gather(*posts)
    backend.script = lambda request: [BatonError(Cause.WORKER_LOST, "")]
    await client.post(COMPLETIONS, json={"prompt": "a"})
    await client.post(COMPLETIONS, json={"prompt": "a", "n": 0})
    assert (await client.get("/load")).json() == {"server_load": 0}


async def test_a_repetition_has_its_own_reason(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.script = lambda request: chunks(request, [5, 5], finish=FinishReason.REPETITION)
    body = {"prompt": "a", "repetition_detection": {"max_pattern_size": 1}}
    (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    assert choice["finish_reason"] == "repetition"
