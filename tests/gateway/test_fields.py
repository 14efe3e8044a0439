"""Fields that change the prompt, the shape of the answer or its defaults; not what is sampled."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import pytest

from baton.gateway.defaults import SamplingDefaults
from baton.settings import GatewaySettings, LimitSettings
from baton.text import Tokenizer
from baton.types import FinishReason, LegId, Logprobs, Request, TokenChunk
from tests.gateway.fakes import FakeBackend, Step, chunks
from tests.gateway.test_completions import events, said, texts
from tests.gateway.test_errors import CHAT, COMPLETIONS, USER, error_of


class TestEcho:
    @pytest.mark.parametrize("as_ids", [False, True])
    async def test_the_prompt_comes_before_the_output(
        self, client: httpx.AsyncClient, tokenizer: Tokenizer, as_ids: bool
    ) -> None:
        prompts: list[Any] = ["Say it", "again"]
        if as_ids:
            prompts = [tokenizer.encode(prompt) for prompt in prompts]
        body = {"prompt": prompts, "n": 2, "echo": True}
        expected = ["Say itHello world"] * 2 + ["againHello world"] * 2
        whole = (await client.post(COMPLETIONS, json=body)).json()
        assert [choice["text"] for choice in whole["choices"]] == expected
        stream = events(await client.post(COMPLETIONS, json={**body, "stream": True}))
        assert texts(stream) == dict(enumerate(expected))
        assert whole["usage"]["completion_tokens"] == len(stream)

    async def test_token_ids_begin_with_the_prompts(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        body = {"prompt": [7, 8], "echo": True, "return_token_ids": True}
        (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
        assert choice["token_ids"] == [7, 8, *said(backend)]
        assert choice["prompt_token_ids"] == [7, 8]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_without_output_no_worker_is_asked(
        self, client: httpx.AsyncClient, backend: FakeBackend, stream: bool
    ) -> None:
        body = {"prompt": "Just this", "echo": True, "max_tokens": 0, "n": 2, "stream": stream}
        response = await client.post(COMPLETIONS, json=body)
        answers = events(response) if stream else [response.json()]
        found = [choice for answer in answers for choice in answer["choices"]]
        assert [(c["text"], c["finish_reason"]) for c in found] == [("Just this", "length")] * 2
        assert not backend.streams

    async def test_a_prompt_that_is_only_echoed_is_checked(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": [4096], "echo": True, "max_tokens": 0}
        assert error_of(await client.post(COMPLETIONS, json=body), 400)["param"] == "prompt"
        body = {"prompt": [1], "echo": False, "max_tokens": 0}
        assert error_of(await client.post(COMPLETIONS, json=body), 400)["param"] == "max_tokens"

    @pytest.mark.parametrize("stream", [False, True])
    async def test_in_a_chat_the_last_message_is_echoed_if_it_is_continued(
        self, client: httpx.AsyncClient, stream: bool
    ) -> None:
        messages = [*USER, {"role": "assistant", "content": [{"type": "text", "text": "So: "}]}]
        body = {"messages": messages, "continue_final_message": True, "echo": True}
        response = await client.post(CHAT, json={**body, "stream": stream})
        if stream:
            deltas = [event["choices"][0]["delta"] for event in events(response)]
            assert deltas[0] == {"role": "assistant", "content": ""}
            content = "".join(delta["content"] for delta in deltas)
        else:
            content = response.json()["choices"][0]["message"]["content"]
        assert content == "So: Hello world"
        other = {"messages": USER, "echo": True}
        (choice,) = (await client.post(CHAT, json=other)).json()["choices"]
        assert choice["message"]["content"] == "Hello world"


class TestPromptLogprobs:
    """The fake gives −id as the logprob of a prompt token."""

    async def test_per_prompt(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        body = {"prompt": [[1, 2], [3, 4, 5]], "n": 2, "prompt_logprobs": 1}
        choices = (await client.post(COMPLETIONS, json=body)).json()["choices"]
        found = [choice["prompt_logprobs"] for choice in choices]
        assert found[0] == found[1]
        assert found[2] == found[3]
        assert found[0][0] is None
        assert found[0][1]["2"] == {"logprob": -2.0, "rank": 2, "decoded_token": ANY}
        assert [entry and list(entry) for entry in found[2]] == [None, ["4", "9"], ["5", "9"]]
        assert all(stream.request.sampling.prompt_logprobs is None for stream in backend.streams)

    async def test_of_chats_and_tokens(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        whole = (await client.post(CHAT, json={"messages": USER, "prompt_logprobs": 0})).json()
        assert len(whole["prompt_logprobs"]) == len(backend.request.prompt_token_ids)
        body = {"token_ids": [5, 6], "sampling_params": {"prompt_logprobs": 2}}
        whole = (await client.post("/inference/v1/generate", json=body)).json()
        assert whole["prompt_logprobs"][1]["6"]["logprob"] == -6.0
        body["stream"] = True  # type: ignore[assignment]
        response = await client.post("/inference/v1/generate", json=body)
        assert error_of(response, 400)["param"] == "prompt_logprobs"

    @pytest.mark.parametrize("max_tokens", [0, 9])
    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_echo_with_logprobs_has_those_of_the_prompt(
        self,
        client: httpx.AsyncClient,
        backend: FakeBackend,
        tokenizer: Tokenizer,
        max_tokens: int,
        stream: bool,
    ) -> None:
        prompt = tokenizer.encode("one two", add_special_tokens=False)
        body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        response = await client.post(COMPLETIONS, json={**body, "stream": stream})
        answers = events(response) if stream else [response.json()]
        choices = [choice for answer in answers for choice in answer["choices"]]
        joined: dict[str, list[Any]] = {}
        for choice in choices:
            for name, column in choice["logprobs"].items():
                joined.setdefault(name, []).extend(column)
        num_output = len(joined["tokens"]) - len(prompt)
        assert (num_output > 0) == (max_tokens > 0)
        scores = [-float(token_id) for token_id in prompt[1:]]
        assert joined["token_logprobs"] == [None, *scores, *[-0.5] * num_output]
        assert joined["top_logprobs"][0] is None
        assert len(joined["top_logprobs"]) == len(joined["tokens"])
        text = "".join(choice["text"] for choice in choices)
        for token, offset in zip(joined["tokens"], joined["text_offset"], strict=True):
            assert text[offset : offset + len(token)] == token

    async def test_an_answer_does_not_grow_without_bound(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": [[1] * 200] * 4, "n": 32, "max_tokens": 1}
        response = await client.post(COMPLETIONS, json={**body, "prompt_logprobs": 20})
        assert response.status_code == 200
        body = {"prompt": [[1] * 250], "n": 128, "max_tokens": 1}
        response = await client.post(COMPLETIONS, json={**body, "prompt_logprobs": 20})
        assert response.status_code == 200
        big = {"prompt": [[1] * 255] * 2, "n": 64, "max_tokens": 1, "prompt_logprobs": 20}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("baton.gateway.scores.MAX_ENTRIES", 255 * 2 * 64 * 21 - 1)
            response = await client.post(COMPLETIONS, json=big)
        assert error_of(response, 400)["param"] == "prompt_logprobs"


async def test_logprobs_of_tokens_asked_for(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    entry = Logprobs(-0.5, 1, ((7, -0.5), (8, -1.0)), asked=((8, -1.0), (300, -9.0)))
    ids = tokenizer.encode("Hi", add_special_tokens=False)

    def script(request: Request) -> list[Step]:
        leg = LegId(request.request_id, 1)
        logprobs = (entry,) * len(ids)
        return [TokenChunk(leg, 0, 0, tuple(ids), logprobs, FinishReason.LENGTH)]

    backend.script = script
    asked = {"logprob_token_ids": [8, 300]}
    body = {"prompt": [1], "logprobs": 1, "return_tokens_as_token_ids": True, **asked}
    (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    assert list(choice["logprobs"]["top_logprobs"][0])[:3] == [
        "token_id:7",
        "token_id:8",
        "token_id:300",
    ]
    chat = {"messages": USER, "logprobs": True, "return_tokens_as_token_ids": True, **asked}
    (choice,) = (await client.post(CHAT, json=chat)).json()["choices"]
    top = choice["logprobs"]["content"][0]["top_logprobs"]
    assert [(other["token"], other["logprob"]) for other in top] == [
        ("token_id:8", -1.0),
        ("token_id:300", -9.0),
    ]


class TestTruncation:
    @pytest.mark.parametrize(
        ("fields", "kept"),
        [
            ({"truncate_prompt_tokens": 3}, slice(-3, None)),
            ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, slice(-3, None)),
            ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(3)),
            ({"truncate_prompt_tokens": 256}, slice(None)),
            ({"truncation_side": "right"}, slice(None)),
        ],
    )
    @pytest.mark.parametrize("as_ids", [False, True])
    async def test_what_is_kept(
        self,
        client: httpx.AsyncClient,
        backend: FakeBackend,
        tokenizer: Tokenizer,
        fields: dict[str, Any],
        kept: slice,
        as_ids: bool,
    ) -> None:
        text = "one two three four five six"
        ids = tokenizer.encode(text)
        body = {"prompt": ids if as_ids else text, **fields}
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200
        assert list(backend.request.prompt_token_ids) == ids[kept]

    @pytest.mark.parametrize(
        ("fields", "num_tokens"), [({}, 240), ({"max_tokens": 100}, 156), ({"max_tokens": 256}, 0)]
    )
    async def test_as_much_as_fits(
        self,
        client: httpx.AsyncClient,
        backend: FakeBackend,
        fields: dict[str, Any],
        num_tokens: int,
    ) -> None:
        body = {"prompt": "x " * 100_000, "truncate_prompt_tokens": -1, **fields}
        response = await client.post(COMPLETIONS, json=body)
        if num_tokens == 0:
            assert error_of(response, 400)["param"] == "prompt"
            return
        assert len(backend.request.prompt_token_ids) == num_tokens
        chat = {"messages": [{"role": "user", "content": "x " * 1000}]}
        await client.post(CHAT, json={**chat, "truncate_prompt_tokens": -1})
        assert len(backend.request.prompt_token_ids) == 255

    async def test_an_echo_shows_what_was_kept(
        self, client: httpx.AsyncClient, tokenizer: Tokenizer
    ) -> None:
        text = "one two three four"
        body = {"prompt": text, "truncate_prompt_tokens": 2, "echo": True}
        (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
        assert choice["text"] == tokenizer.decode(tokenizer.encode(text)[-2:]) + "Hello world"


async def test_the_rendered_prompt(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = {"messages": USER, "return_prompt_text": True}
    assert (await client.post(CHAT, json=body)).json()["prompt_text"] == tokenizer.render_chat(USER)
    stream = events(await client.post(CHAT, json={**body, "stream": True}))
    assert stream[0]["prompt_text"] == tokenizer.render_chat(USER)
    assert all("prompt_text" not in event for event in stream[1:])


@pytest.mark.parametrize("by", ["field", "flag"])
async def test_tokens_shown_as_ids(
    client: httpx.AsyncClient, backend: FakeBackend, context: Any, by: str
) -> None:
    field = {"return_tokens_as_token_ids": True} if by == "field" else {}
    if by == "flag":
        object.__setattr__(context.settings, "return_tokens_as_token_ids", True)
    body = {"prompt": "Hi", "logprobs": 1, **field}
    (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    expected = [f"token_id:{token_id}" for token_id in said(backend)]
    assert choice["logprobs"]["tokens"] == expected
    assert [next(iter(top)) for top in choice["logprobs"]["top_logprobs"]] == expected
    chat = {"messages": USER, "logprobs": True, "top_logprobs": 1, **field}
    (choice,) = (await client.post(CHAT, json=chat)).json()["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == expected
    override = {**body, "return_tokens_as_token_ids": False}
    (choice,) = (await client.post(COMPLETIONS, json=override)).json()["choices"]
    assert "token_id" not in json.dumps(choice["logprobs"])


@pytest.mark.parametrize(("field", "flag", "expected"), [(4, 1, 4), (None, 3, 3), (2, 3, 3)])
async def test_chunks_of_several_tokens(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    tokenizer: Tokenizer,
    context: Any,
    field: int | None,
    flag: int,
    expected: int,
) -> None:
    object.__setattr__(context.settings, "stream_interval", flag)
    ids = tokenizer.encode("one two three four five six seven eight", add_special_tokens=False)
    backend.script = lambda request: chunks(request, ids)
    body = {"prompt": "Hi", "stream": True, "stream_interval": field, "return_token_ids": True}
    stream = events(await client.post(COMPLETIONS, json={**body, "logprobs": 0}))
    sizes = [len(event["choices"][0]["token_ids"]) for event in stream]
    assert sizes[0] == 1, "the first token does not wait"
    assert set(sizes[1:-1]) == {expected}
    assert [len(event["choices"][0]["logprobs"]["tokens"]) for event in stream] == sizes
    assert sum(sizes) == len(ids)
    assert texts(stream) == {0: tokenizer.decode(ids)}


async def test_ids_of_answers(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    given = {"X-Request-Id": "from-header"}
    body = {"prompt": "Hi"}
    assert (await client.post(COMPLETIONS, json=body, headers=given)).json()["id"] == (
        "cmpl-from-header"
    )
    body["request_id"] = "from <body>"
    stream = events(await client.post(COMPLETIONS, json={**body, "stream": True}, headers=given))
    assert {event["id"] for event in stream} == {"cmpl-frombody"}
    chat = await client.post(CHAT, json={"messages": USER, "request_id": "c"})
    assert chat.json()["id"] == "chatcmpl-c"


async def test_a_chat_without_generation_prompt_goes_on_in_the_last_role(
    client: httpx.AsyncClient,
) -> None:
    body = {"messages": USER, "add_generation_prompt": False}
    (choice,) = (await client.post(CHAT, json=body)).json()["choices"]
    assert choice["message"]["role"] == "user"


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
async def test_the_fingerprint_of_a_stream_comes_last(
    client: httpx.AsyncClient, url: str, usage: bool
) -> None:
    body: dict[str, Any] = {"prompt": "Hi"} if url == COMPLETIONS else {"messages": USER}
    options = {"stream_options": {"include_usage": True}} if usage else {}
    stream = events(await client.post(url, json={**body, "stream": True, **options}))
    assert ["system_fingerprint" in event for event in stream] == [False] * (len(stream) - 1) + [
        True
    ]


class TestBudget:
    @pytest.fixture
    def limits(self) -> LimitSettings:
        return LimitSettings(max_request_tokens=1000, max_choices=20)

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"prompt": [[1]] * 10, "max_tokens": 99}, None),
            ({"prompt": [[1]] * 10, "max_tokens": 100}, "max_tokens"),
            ({"prompt": [1], "n": 10, "max_tokens": 100}, "max_tokens"),
            ({"prompt": [[1] * 200] * 5, "max_tokens": 1}, "max_tokens"),
            ({"prompt": [[1]] * 21, "max_tokens": 1}, "prompt"),
            ({"prompt": [[1]] * 3, "n": 7, "max_tokens": 1}, "prompt"),
        ],
    )
    async def test_prompts_times_n_times_length(
        self, client: httpx.AsyncClient, backend: FakeBackend, body: Any, param: str | None
    ) -> None:
        response = await client.post(COMPLETIONS, json=body)
        if param is None:
            assert response.status_code == 200
        else:
            assert error_of(response, 400)["param"] == param
            assert not backend.streams


class TestDefaults:
    """`--generation-config`, `--override-generation-config`."""

    def load(self, tokenizer: Tokenizer, **settings: Any) -> SamplingDefaults:
        return SamplingDefaults.load(GatewaySettings.model_validate(settings), tokenizer)

    def test_sources(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        config = {"top_p": 0.5, "max_new_tokens": 9, "eos_token_id": 7, "num_beams": 4}
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
        assert dict(self.load(tokenizer).values) == dict(tokenizer.sampling_defaults)
        assert self.load(tokenizer, generation_config="vllm") == SamplingDefaults()
        found = self.load(
            tokenizer,
            generation_config=str(tmp_path),
            override_generation_config='{"top_p": 0.7, "presence_penalty": 1}',
        )
        assert found == SamplingDefaults(
            {"top_p": 0.7, "presence_penalty": 1}, max_new_tokens=9, eos_token_ids=(7,)
        )

    @pytest.mark.parametrize(
        "override",
        [
            '{"temperature": "hot"}',
            '{"top_k": true}',
            '{"max_new_tokens": 0}',
            '{"eos_token_id": [-1]}',
            '{"skip_special_tokens": 1}',
        ],
    )
    def test_values_that_make_no_sense(self, tokenizer: Tokenizer, override: str) -> None:
        with pytest.raises(ValueError, match="generation config"):
            self.load(tokenizer, override_generation_config=override)

    def test_a_file_that_is_not_there(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be read"):
            self.load(tokenizer, generation_config=str(tmp_path))

    @pytest.mark.parametrize("text", ["[]", "nope"])
    def test_an_override_is_a_json_object(self, text: str) -> None:
        with pytest.raises(ValueError, match="JSON object"):
            GatewaySettings.model_validate({"override_generation_config": text})

    class TestInRequests:
        @pytest.fixture
        def settings(self) -> GatewaySettings:
            override = {
                "temperature": 0.3,
                "frequency_penalty": 0.5,
                "max_new_tokens": 4,
                "eos_token_id": 5,
                "skip_special_tokens": False,
            }
            return GatewaySettings(override_generation_config=json.dumps(override))

        async def test_what_is_not_given(
            self, client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
        ) -> None:
            (special,) = tokenizer.encode(str(tokenizer._token_bytes._backend.id_to_token(0)))
            backend.script = lambda request: chunks(request, [special])
            body = {"prompt": [1], "stop_token_ids": [9]}
            (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
            assert choice["text"] != "", "special tokens are shown"
            sampling = backend.request.sampling
            assert (sampling.temperature, sampling.frequency_penalty) == (0.3, 0.5)
            assert sampling.max_tokens == 4
            assert sampling.stop_token_ids == (9, 5)

        async def test_what_is_given_wins(
            self, client: httpx.AsyncClient, backend: FakeBackend
        ) -> None:
            body = {"prompt": [1], "temperature": 1, "frequency_penalty": 0, "ignore_eos": True}
            await client.post(COMPLETIONS, json={**body, "max_tokens": 2})
            sampling = backend.request.sampling
            assert (sampling.temperature, sampling.frequency_penalty) == (1, 0)
            assert (sampling.max_tokens, sampling.stop_token_ids) == (2, ())
