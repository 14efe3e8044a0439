"""/v1/completions: prompts, fields, shapes of whole and streamed answers."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from baton.gateway.backend import ServedModel
from baton.hashing import join_salt
from baton.text import Tokenizer
from baton.types import (
    FinishReason,
    RepetitionDetection,
    Request,
    StructuredKind,
    StructuredOutput,
    TokenChunk,
)
from tests.gateway.fakes import FakeBackend, Step, chunks

URL = "/v1/completions"
MIXED = "naïve 👩‍👩‍👧 日本語 text"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream that ended well."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def texts(stream: Sequence[dict[str, Any]]) -> dict[int, str]:
    """index → concatenated deltas."""
    joined: dict[int, str] = {}
    for event in stream:
        for choice in event["choices"]:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


def said(backend: FakeBackend) -> list[int]:
    """What the last request was answered with."""
    steps = backend.script(backend.request)
    return [i for step in steps if isinstance(step, TokenChunk) for i in step.token_ids]


async def test_whole_answer(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.post(URL, json={"model": "tiny", "prompt": "Hi", "max_tokens": 64})
    assert response.status_code == 200
    body = response.json()
    num_output = len(said(backend))
    num_prompt = len(backend.request.prompt_token_ids)
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 0
    assert body.pop("system_fingerprint").startswith("baton-")
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "Hello world",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                **dict.fromkeys(("token_ids", "prompt_token_ids", "prompt_logprobs")),
                **dict.fromkeys(("routed_experts", "weight_versions")),
            }
        ],
        **dict.fromkeys(("service_tier", "kv_transfer_params", "ec_transfer_params", "metrics")),
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
async def test_deltas_concatenate_and_never_split_a_character(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer, per_chunk: int
) -> None:
    ids = tokenizer.encode(MIXED, add_special_tokens=False)
    backend.script = lambda request: chunks(request, ids, per_chunk=per_chunk)
    body = {"prompt": "Hi", "max_tokens": 200}
    stream = events(await client.post(URL, json={**body, "stream": True}))
    whole = (await client.post(URL, json=body)).json()
    assert texts(stream) == {0: MIXED}
    assert whole["choices"][0]["text"] == MIXED
    assert "\ufffd" not in json.dumps(stream, ensure_ascii=False)
    assert len({(event["id"], event["created"], event["model"]) for event in stream}) == 1
    reasons = [event["choices"][0]["finish_reason"] for event in stream]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert all("usage" not in event for event in stream)


async def test_bytes_that_are_no_text_are_replaced_and_not_held_back(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("👩", add_special_tokens=False)
    assert len(ids) > 1, "the vocabulary has no token for this character"
    backend.script = lambda request: chunks(request, ids[:-1])
    stream = events(await client.post(URL, json={"prompt": "Hi", "stream": True}))
    assert texts(stream) == {0: "\ufffd"}


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("Hi", 1), (["Hi", "you"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2), (["Hi", [5, 6]], 2)],
)
async def test_prompts(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    tokenizer: Tokenizer,
    prompt: Any,
    num_prompts: int,
) -> None:
    answer = (await client.post(URL, json={"prompt": prompt, "n": 2, "seed": 1})).json()
    entries = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    expected = [
        tuple(tokenizer.encode(entry) if isinstance(entry, str) else entry) for entry in entries
    ]
    sent = [stream.request for stream in backend.streams]
    assert [request.prompt_token_ids for request in sent] == expected
    assert len({request.request_id for request in sent}) == num_prompts
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num_prompts))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_choices_are_prompt_major_in_streams_too(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    expected = {(p, c): f"prompt {p} choice {c}" for p in range(2) for c in range(2)}

    def script(request: Request) -> list[Step]:
        number = request.prompt_token_ids[0]
        return [
            chunk
            for choice in range(2)
            for chunk in chunks(
                request, tokenizer.encode(expected[number, choice]), choice=choice, per_chunk=2
            )
        ]

    backend.script = script
    body = {"prompt": [[0], [1]], "n": 2, "max_tokens": 64}
    whole = (await client.post(URL, json=body)).json()
    assert [choice["text"] for choice in whole["choices"]] == list(expected.values())
    stream = events(await client.post(URL, json={**body, "stream": True}))
    assert texts(stream) == dict(enumerate(expected.values()))


async def test_usage_in_streams(client: httpx.AsyncClient) -> None:
    body = {"prompt": "Hi", "stream": True}
    options = {"include_usage": True}
    *stream, last = events(await client.post(URL, json={**body, "stream_options": options}))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(stream)
    assert all("usage" not in event for event in stream)
    options["continuous_usage_stats"] = True
    *stream, last = events(await client.post(URL, json={**body, "stream_options": options}))
    counts = [event["usage"]["completion_tokens"] for event in stream]
    assert counts == list(range(1, len(stream) + 1))
    assert last["usage"]["completion_tokens"] == counts[-1]


async def test_token_ids(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"prompt": [7, 8], "return_token_ids": True}
    (choice,) = (await client.post(URL, json=body)).json()["choices"]
    ids = said(backend)
    assert choice["token_ids"] == ids
    assert choice["prompt_token_ids"] == [7, 8]
    stream = events(await client.post(URL, json={**body, "stream": True}))
    assert [event["choices"][0]["token_ids"] for event in stream] == [[i] for i in ids]
    assert stream[0]["choices"][0]["prompt_token_ids"] == [7, 8]
    assert all("prompt_token_ids" not in event["choices"][0] for event in stream[1:])


async def test_logprobs(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    (choice,) = (await client.post(URL, json={"prompt": "Hi", "logprobs": 2})).json()["choices"]
    assert backend.request.sampling.logprobs == 2
    ids = said(backend)
    tokens = [tokenizer.token_bytes(i).decode() for i in ids]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == tokens
    assert logprobs["token_logprobs"] == [-0.5] * len(ids)
    for i, token, top in zip(ids, tokens, logprobs["top_logprobs"], strict=True):
        assert top == {tokenizer.token_bytes(i + 1).decode(errors="replace"): -1.5, token: -0.5}
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    assert logprobs["text_offset"] == offsets
    body = {"prompt": "Hi", "logprobs": 0, "stream": True}
    stream = events(await client.post(URL, json=body))
    parts = [event["choices"][0]["logprobs"] for event in stream]
    assert [part["text_offset"] for part in parts] == [[offset] for offset in offsets]
    assert [part["top_logprobs"] for part in parts] == [[{token: -0.5}] for token in tokens]


@pytest.mark.parametrize("per_chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("include", [False, True])
async def test_stop_strings_across_chunks(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    tokenizer: Tokenizer,
    per_chunk: int,
    include: bool,
) -> None:
    ids = tokenizer.encode("one two three four five six")
    backend.script = lambda request: chunks(request, ids, per_chunk=per_chunk)
    body = {"prompt": "Hi", "stop": ["zzz", "ee fo"], "include_stop_str_in_output": include}
    shown = "one two thr" + ("ee fo" if include else "")
    needed = next(n for n in range(len(ids)) if "ee fo" in tokenizer.decode(ids[:n]))
    (choice,) = (whole := (await client.post(URL, json=body)).json())["choices"]
    assert choice["text"] == shown
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "ee fo")
    assert whole["usage"]["completion_tokens"] == needed
    assert backend.streams[-1].finished_choices == [0]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *stream, last = events(await client.post(URL, json={**body, **options}))
    assert texts(stream) == {0: shown}
    assert stream[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == needed


async def test_a_stopped_choice_leaves_the_others_running(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    def script(request: Request) -> list[Step]:
        long = chunks(request, tokenizer.encode("left STOP surplus"), choice=0, per_chunk=100)
        rest = chunks(request, tokenizer.encode("right to the end"), choice=1)
        return [*long, *rest]

    backend.script = script
    body = {"prompt": "Hi", "n": 2, "stop": " STOP", "max_tokens": 100}
    answer = (await client.post(URL, json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["left", "right to the end"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    assert backend.streams[0].finished_choices == [0]


@pytest.mark.parametrize("hidden", ["eos", "stop_id", "eos_ignored"])
async def test_the_token_that_stops_is_counted_but_not_shown(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer, hidden: str
) -> None:
    eos, other = tokenizer.eos_token_ids[0], tokenizer.encode("x")[0]
    last = other if hidden == "stop_id" else eos
    ids = [*tokenizer.encode("Done"), last]
    backend.script = lambda request: chunks(
        request, ids, finish=FinishReason.STOP, stop_token_id=last
    )
    body: dict[str, Any] = {"prompt": "Hi", "stop_token_ids": [last], "return_token_ids": True}
    body |= {"ignore_eos": hidden == "eos_ignored", "skip_special_tokens": False}
    answer = (await client.post(URL, json=body)).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "Done"
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == (None if hidden == "eos" else last)
    assert choice["token_ids"] == ids
    assert answer["usage"]["completion_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, 16), (5, 5), (256, 253), ("absent", 16)],
)
async def test_max_tokens_is_cut_to_what_the_model_can_hold(
    client: httpx.AsyncClient, backend: FakeBackend, given: Any, expected: int
) -> None:
    body: dict[str, Any] = {"prompt": [1, 2, 3]}
    if given != "absent":
        body["max_tokens"] = given
    assert (await client.post(URL, json=body)).status_code == 200
    assert backend.request.sampling.max_tokens == expected


async def test_sampling_fields_reach_the_workers(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.2,
        "seed": 11,
        "min_tokens": 2,
        "ignore_eos": True,
        "max_tokens": 9,
    }
    others: dict[str, Any] = {
        "logit_bias": {"7": 101, "5": -1},
        "allowed_token_ids": [5, 7],
        "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
        "bad_words": ["no"],
        "structured_outputs": {"choice": ["yes", "no"]},
    }
    body = {
        "prompt": [1],
        **fields,
        **others,
        "stop_token_ids": [3, 4],
        "stop": "x",
        "cache_salt": "s1",
        "priority": -3,
        "no_such_field": {"is": "ignored"},
    }
    assert (await client.post(URL, json=body)).status_code == 200
    request = backend.request
    for name, value in fields.items():
        assert getattr(request.sampling, name) == value, name
    assert request.sampling.stop_token_ids == (3, 4)
    assert request.sampling.logit_bias == ((5, -1.0), (7, 100.0))
    assert request.sampling.bad_words == ("no",)
    assert request.sampling.bad_words_token_ids
    assert request.sampling.structured_outputs == StructuredOutput(
        StructuredKind.CHOICE, '["yes", "no"]'
    )
    assert request.sampling.allowed_token_ids == (5, 7)
    assert request.sampling.repetition_detection == RepetitionDetection(4, min_count=3)
    assert request.sampling.stop == ("x",)
    assert request.salt == join_salt(b"", b"s1")
    assert request.priority == -3
    assert request.deadline_ms == 600_000


async def test_what_is_not_given(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    """Defaults come from the model's generation_config; a seed is drawn, a new one each time."""
    for seed in (None, -1):
        assert (await client.post(URL, json={"prompt": [1], "seed": seed})).status_code == 200
    first, second = (stream.request.sampling for stream in backend.streams)
    assert first.seed is not None
    assert first.seed != second.seed
    for name, value in tokenizer.sampling_defaults.items():
        assert getattr(first, name) == value
    assert backend.request.salt == join_salt(b"", b"")


@pytest.mark.parametrize(("given", "used"), [(1e-6, 0.0), (0.001, 0.01), (0.02, 0.02)])
async def test_tiny_temperatures(
    client: httpx.AsyncClient, backend: FakeBackend, given: float, used: float
) -> None:
    await client.post(URL, json={"prompt": [1], "temperature": given})
    assert backend.request.sampling.temperature == used


async def test_a_clients_id_is_never_a_key(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for _ in range(2):
        response = await client.post(
            URL,
            json={"prompt": [1], "request_id": "mine"},
            headers={"X-Request-Id": "mine\tand <more>" + "x" * 500},
        )
        echoed = response.headers["x-request-id"]
        assert echoed.startswith("mineandmorexxx")
        assert len(echoed) == 128
    ids = [stream.request.request_id for stream in backend.streams]
    assert len(set(ids)) == 2
    assert not any("mine" in request_id for request_id in ids)


async def test_several_served_names(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    model: ServedModel,
) -> None:
    second = ServedModel("alias", model.max_model_len, model.vocab_size, model.eos_token_ids)
    backend.served = (model, second)
    answer = (await client.post(URL, json={"prompt": "Hi", "model": "alias"})).json()
    assert answer["model"] == "alias"
