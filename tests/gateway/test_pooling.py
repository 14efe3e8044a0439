"""/v1/embeddings, /score and /rerank over a scripted backend."""

import asyncio
import base64
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from baton.errors import BatonError, Cause
from baton.gateway.backend import ServedModel
from baton.gateway.context import Context
from baton.pooling import PoolingInfo, PoolingInput, PoolingTask
from baton.scoring import cosine
from baton.text import Tokenizer
from tests.gateway.fakes import FakeBackend, embedding
from tests.gateway.test_errors import error_of as any_error_of

EMBED = PoolingInfo(PoolingTask.EMBED, 4)
MATRYOSHKA = PoolingInfo(PoolingTask.EMBED, 4, is_matryoshka=True)
SCORE = PoolingInfo(PoolingTask.SCORE, 1, tells_pairs=True)
PATHS = ("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank")
Served = Callable[[PoolingInfo | None], None]


@pytest.fixture
def served(backend: FakeBackend, model: ServedModel) -> Served:
    """served(info): the backend has such a model and no other."""

    def serve(info: PoolingInfo | None) -> None:
        name = "tiny" if info is None else "pooler"
        backend.served = (
            ServedModel(name, model.max_model_len, model.vocab_size, model.eos_token_ids, info),
        )

    serve(EMBED)
    return serve


@pytest.fixture
def ids(tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(tokenizer.encode(text))


async def post(client: httpx.AsyncClient, url: str, **body: Any) -> dict[str, Any]:
    response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def error_of(response: httpx.Response, status: int, **expected: str) -> dict[str, Any]:
    """The error's body, which has these fields."""
    error = any_error_of(response, status)
    assert {name: error[name] for name in expected} == expected, error
    return error


# ── embeddings ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("served")
async def test_texts_and_ids_in_their_order(
    client: httpx.AsyncClient, backend: FakeBackend, ids: Callable[[str], tuple[int, ...]]
) -> None:
    body = await post(client, "/v1/embeddings", input=["Hi", "Hello world"], request_id="x")
    inputs = [PoolingInput(ids("Hi")), PoolingInput(ids("Hello world"))]
    assert list(backend.pooled[0].inputs) == inputs
    assert [entry["embedding"] for entry in body["data"]] == [
        pytest.approx(embedding(one, 4)) for one in inputs
    ]
    assert [(e["index"], e["object"]) for e in body["data"]] == [
        (0, "embedding"),
        (1, "embedding"),
    ]
    num_tokens = len(ids("Hi")) + len(ids("Hello world"))
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (num_tokens, num_tokens)
    assert (body["id"], body["object"], body["model"]) == ("embd-x", "list", "pooler")
    for given in ([1, 2, 3], [[1, 2, 3]]):
        await post(client, "/v1/embeddings", input=given)
        assert backend.pooled[-1].inputs == (PoolingInput((1, 2, 3)),)


@pytest.mark.usefixtures("served")
async def test_encodings(client: httpx.AsyncClient) -> None:
    expected = embedding(PoolingInput((5, 6)), 4)
    for fields, kind in (
        ({}, "<4f"),
        ({"endianness": "big"}, ">4f"),
        ({"embed_dtype": "float16", "endianness": "little"}, "<4e"),
    ):
        body = await post(
            client, "/v1/embeddings", input=[5, 6], encoding_format="base64", **fields
        )
        values = struct.unpack(kind, base64.b64decode(body["data"][0]["embedding"]))
        assert values == pytest.approx(expected, rel=1e-3)


async def test_dimensions_are_for_matryoshka_models(
    client: httpx.AsyncClient, backend: FakeBackend, served: Served
) -> None:
    refused = await client.post("/v1/embeddings", json={"input": "x", "dimensions": 2})
    assert "pooler" in error_of(refused, 400, param="dimensions")["message"]
    served(MATRYOSHKA)
    body = await post(client, "/v1/embeddings", input="x", dimensions=2, use_activation=False)
    assert len(body["data"][0]["embedding"]) == 2
    assert (backend.pooled[-1].dimensions, backend.pooled[-1].use_activation) == (2, False)
    for dimensions in (0, 5):
        wrong = await client.post("/v1/embeddings", json={"input": "x", "dimensions": dimensions})
        error_of(wrong, 400, param="dimensions")
    served(PoolingInfo(PoolingTask.EMBED, 4, is_matryoshka=True, dimensions=(3,)))
    error_of(
        await client.post("/v1/embeddings", json={"input": "x", "dimensions": 2}),
        400,
        param="dimensions",
    )


@pytest.mark.usefixtures("served")
async def test_truncation(
    client: httpx.AsyncClient, backend: FakeBackend, ids: Callable[[str], tuple[int, ...]]
) -> None:
    text = "Hello world, this is long"
    whole = ids(text)
    for fields, expected in (
        ({"truncate_prompt_tokens": 3}, whole[:3]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, whole[-3:]),
        ({"truncate_prompt_tokens": -1}, whole),
    ):
        for given in (text, list(whole)):
            await post(client, "/v1/embeddings", input=given, **fields)
            assert backend.pooled[-1].inputs[0].token_ids == expected
    await post(client, "/v1/embeddings", input="word " * 5000, truncate_prompt_tokens=-1)
    assert len(backend.pooled[-1].inputs[0].token_ids) == 256
    for wrong in (-2, 0, 257):
        refused = await client.post(
            "/v1/embeddings", json={"input": "x", "truncate_prompt_tokens": wrong}
        )
        error_of(refused, 400, param="truncate_prompt_tokens")


@pytest.mark.usefixtures("served")
async def test_a_chat(client: httpx.AsyncClient, backend: FakeBackend, context: Context) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    await post(client, "/v1/embeddings", messages=messages)
    expected = context.tokenizers.tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert backend.pooled[-1].inputs[0].token_ids == tuple(expected)
    both = await client.post("/v1/embeddings", json={"messages": messages, "input": "x"})
    error_of(both, 400, param="input")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["x", 5]}, "input"),
        ({"input": {"text": "x"}}, "input"),
        ({"input": [4096]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "bytes"}, "encoding_format"),
        ({"input": "x", "embed_dtype": "int8"}, "embed_dtype"),
        ({"input": "x", "endianness": "middle"}, "endianness"),
        ({"input": "x", "dimensions": "many"}, "dimensions"),
        ({"input": "x", "padding": True}, "padding"),
        ({"input": "x", "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"input": "x", "truncation_side": "up"}, "truncation_side"),
        ({"input": "x", "priority": 2**64}, "priority"),
        ({"input": "x", "use_activation": 1}, "use_activation"),
    ],
)
@pytest.mark.usefixtures("served")
async def test_bad_embedding_requests(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    error_of(await client.post("/v1/embeddings", json=body), 400, param=param)


@pytest.mark.parametrize("given", [[7] * 257, "word " * 300, "x" * (256 * 256 + 1)])
@pytest.mark.usefixtures("served")
async def test_what_is_too_long(client: httpx.AsyncClient, given: object) -> None:
    response = await client.post("/v1/embeddings", json={"input": given})
    error_of(response, 400, param="input", code="context_length_exceeded")


# ── scores ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_cross_encoder_sees_pairs(
    client: httpx.AsyncClient, backend: FakeBackend, served: Served, tokenizer: Tokenizer
) -> None:
    served(SCORE)
    body = await post(client, "/score", text_1="Hi", text_2=["Hello", "world"])
    pairs = [PoolingInput(*_pair(tokenizer, "Hi", second)) for second in ("Hello", "world")]
    assert list(backend.pooled[-1].inputs) == pairs
    assert pairs[0].second_start == len(tokenizer.encode("Hi", add_special_tokens=False))
    assert [entry["score"] for entry in body["data"]] == [
        pytest.approx(embedding(pair, 1)[0]) for pair in pairs
    ]
    assert {entry["object"] for entry in body["data"]} == {"score"}
    assert body["usage"]["prompt_tokens"] == sum(len(pair.token_ids) for pair in pairs)
    served(PoolingInfo(PoolingTask.SCORE, 1))
    await post(client, "/score", text_1="Hi", text_2="Hello")
    assert backend.pooled[-1].inputs[0].second_start is None


def _pair(tokenizer: Tokenizer, first: str, second: str) -> tuple[tuple[int, ...], int | None]:
    ids, start = tokenizer.encode_input(first, second)
    return tuple(ids), start


@pytest.mark.usefixtures("served")
async def test_an_embedding_model_scores_by_cosine(
    client: httpx.AsyncClient, backend: FakeBackend, ids: Callable[[str], tuple[int, ...]]
) -> None:
    body = await post(client, "/score", queries=["Hi"], documents=["Hi", "Hello", "world", "Hi"])
    assert len(backend.pooled[-1].inputs) == 3  # each text once
    texts = ("Hi", "Hello", "world")
    hi, *others = (np.array(embedding(PoolingInput(ids(text)), 4)) for text in texts)
    expected = [
        float(hi @ other / np.linalg.norm(hi) / np.linalg.norm(other))
        for other in (hi, *others, hi)
    ]
    assert [entry["score"] for entry in body["data"]] == pytest.approx(expected, abs=1e-6)
    body = await post(client, "/score", data_1=["Hi", "world"], data_2=["Hello", "Hi"])
    assert len(body["data"]) == 2
    assert cosine(np.zeros(3), np.ones(3)) == 0.0


@pytest.mark.parametrize("path", PATHS[2:])
async def test_rerank_sorts(client: httpx.AsyncClient, served: Served, path: str) -> None:
    served(SCORE)
    documents = ["Hi", "Hello world", "w", "Hello"]
    whole = await post(client, path, query="Hi", documents=documents)
    scores = [result["relevance_score"] for result in whole["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in whole["results"]) == [0, 1, 2, 3]
    for result in whole["results"]:
        assert result["document"]["text"] == documents[result["index"]]
    best = await post(client, path, query="Hi", documents=documents, top_n=2)
    assert best["results"] == whole["results"][:2]
    assert best["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/score", {}, "text_1"),
        ("/score", {"text_1": "x"}, "text_2"),
        ("/score", {"text_1": "x", "queries": "y", "text_2": "z"}, "text_1"),
        ("/score", {"text_1": ["x", "y"], "text_2": ["z"]}, "text_2"),
        ("/score", {"text_1": ["x", "y"], "text_2": ["a", "b", "c"]}, "text_2"),
        ("/score", {"text_1": [], "text_2": "z"}, "text_1"),
        ("/score", {"text_1": "", "text_2": "z"}, "text_1"),
        ("/score", {"text_1": "x", "text_2": [1]}, "text_2"),
        ("/score", {"text_1": "x", "text_2": ["z"] * 2049}, "text_2"),
        ("/rerank", {"documents": ["x"]}, "query"),
        ("/rerank", {"query": "x"}, "documents"),
        ("/rerank", {"query": "x", "documents": []}, "documents"),
        ("/rerank", {"query": "x", "documents": "y"}, "documents"),
        ("/rerank", {"query": "x", "documents": ["y"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "x", "documents": ["y" * 70_000]}, "documents"),
    ],
)
async def test_bad_score_requests(
    client: httpx.AsyncClient, served: Served, path: str, body: dict[str, Any], param: str
) -> None:
    for info in (SCORE, EMBED):
        served(info)
        error_of(await client.post(path, json=body), 400, param=param)


# ── which model does what ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/v1/embeddings", *PATHS])
async def test_a_generating_model_is_named(
    client: httpx.AsyncClient, served: Served, path: str
) -> None:
    served(None)
    body = {"input": "x", "text_1": "x", "text_2": "x"}
    if "rerank" in path:
        body = {"query": "x", "documents": ["x"]}  # type: ignore[dict-item]
    error = error_of(await client.post(path, json=body), 400, param="model", code="unsupported")
    assert "tiny" in error["message"]
    unknown = await client.post(path, json={**body, "model": "nope"})
    error_of(unknown, 404, param="model", code="model_not_found")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/inference/v1/generate", {"token_ids": [1]}),
        ("/invocations", {"prompt": "x"}),
    ],
)
@pytest.mark.usefixtures("served")
async def test_a_pooling_model_generates_nothing(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    error = error_of(await client.post(path, json=body), 400, param="model", code="unsupported")
    assert "pooler" in error["message"]


async def test_a_cross_encoder_embeds_nothing(client: httpx.AsyncClient, served: Served) -> None:
    served(SCORE)
    response = await client.post("/v1/embeddings", json={"input": "x"})
    error_of(response, 400, param="model", code="unsupported")


async def test_without_a_name_the_model_that_can(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel, served: Served
) -> None:
    backend.served = (model, *backend.served)
    assert (await post(client, "/v1/embeddings", input="x"))["model"] == "pooler"
    assert (await post(client, "/v1/completions", prompt="x"))["model"] == "tiny"
    entries = (await client.get("/v1/models")).json()["data"]
    assert [(entry["id"], entry.get("task")) for entry in entries] == [
        ("tiny", None),
        ("pooler", "embed"),
    ]


@pytest.mark.parametrize(
    ("info", "body", "kind"),
    [
        (EMBED, {"input": "x"}, "list"),
        (SCORE, {"text_1": "x", "text_2": "y"}, "list"),
        (SCORE, {"query": "x", "documents": ["y"]}, None),
    ],
)
async def test_invocations_know_them_by_their_shape(
    client: httpx.AsyncClient, served: Served, info: PoolingInfo, body: dict[str, Any], kind: str
) -> None:
    served(info)
    assert (await post(client, "/invocations", **body)).get("object") == kind


# ── life ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("served")
async def test_failures_and_metrics(
    client: httpx.AsyncClient, backend: FakeBackend, context: Context
) -> None:
    await post(client, "/v1/embeddings", input=[1, 2])
    backend.refuse = BatonError(Cause.OVERLOADED, "too many open requests")
    response = await client.post("/v1/embeddings", json={"input": "x"})
    error_of(response, 429)
    assert response.headers["retry-after"]
    backend.refuse = BatonError(Cause.WORKER_LOST, "10.0.0.1 is gone")
    assert "10.0.0.1" not in error_of(await client.post("/score", json=_PAIR), 503)["message"]
    backend.refuse = None
    text = (await client.get("/metrics")).text
    for series in (
        'baton_requests_total{endpoint="/v1/embeddings",outcome="ok"} 1.0',
        'baton_requests_total{endpoint="/v1/embeddings",outcome="overloaded"} 1.0',
        'baton_requests_total{endpoint="/score",outcome="worker_lost"} 1.0',
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="pooler"} 1.0',
        "baton_requests_open 0.0",
    ):
        assert series in text
    assert not len(context.inflight)


_PAIR = {"text_1": "x", "text_2": "y"}


@pytest.mark.usefixtures("served")
async def test_a_drain_that_ends_says_so(
    client: httpx.AsyncClient, backend: FakeBackend, context: Context
) -> None:
    backend.hold = asyncio.Event()
    asking = asyncio.create_task(client.post("/v1/embeddings", json={"input": "x"}))
    while not backend.num_pooling:
        await asyncio.sleep(0.01)
    context.inflight.fail_all(BatonError(Cause.DRAINING, "shut down"))
    error_of(await asking, 503)
    assert (backend.num_pooling, len(context.inflight)) == (0, 0)


@pytest.mark.usefixtures("served")
async def test_a_client_that_goes_away_ends_the_work(
    server: str, backend: FakeBackend, context: Context
) -> None:
    backend.hold = asyncio.Event()
    async with httpx.AsyncClient(base_url=f"http://{server}") as client:
        asking = asyncio.create_task(client.post("/v1/embeddings", json={"input": "x"}))
        while not backend.num_pooling:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(20):
        while backend.num_pooling or len(context.inflight):
            await asyncio.sleep(0.01)


# ── the official client ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def api(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{server}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def test_openai(api: openai.AsyncOpenAI, served: Served) -> None:
    served(MATRYOSHKA)
    expected = embedding(PoolingInput((5, 6)), 4)
    # By default the client asks for base64 and decodes it.
    default = await api.embeddings.create(model="pooler", input=[5, 6])
    numbers = await api.embeddings.create(model="pooler", input=[[5, 6]], encoding_format="float")
    for answer in (default, numbers):
        assert answer.data[0].embedding == pytest.approx(expected)
        assert answer.usage.prompt_tokens == 2
    encoded = await api.embeddings.create(
        model="pooler", input=[5, 6], encoding_format="base64", dimensions=2
    )
    text: Any = encoded.data[0].embedding
    assert struct.unpack("<2f", base64.b64decode(text)) == pytest.approx(expected[:2])
    many = await api.embeddings.create(model="pooler", input=["Hi", "Hello"])
    assert [entry.index for entry in many.data] == [0, 1]
    with pytest.raises(openai.BadRequestError) as caught:
        await api.embeddings.create(model="pooler", input="")
    assert caught.value.param == "input"
