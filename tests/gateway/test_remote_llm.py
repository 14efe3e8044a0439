"""LLM(base_url=…) as the contract: what it asks arrives whole, and what is answered is read."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from baton import LLM, BeamSearchParams, SamplingParams, StructuredOutput
from baton.client.llm import RemoteLLM
from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.backend import ServedModel
from baton.outputs import Logprob
from baton.pooling import PoolingInfo, PoolingInput, PoolingParams, PoolingTask
from baton.scoring import cosine
from baton.settings import GatewaySettings
from baton.text import Tokenizer
from baton.types import RepetitionDetection
from tests.gateway.fakes import FakeBackend, embedding

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings.model_validate({"api_key": "key"})


@pytest.fixture
async def llm(server: str) -> AsyncIterator[LLM]:
    llm = await asyncio.to_thread(LLM, base_url=f"http://{server}/v1", api_key="key", seed=3)
    yield llm
    await asyncio.to_thread(llm.close)


async def generate(llm: LLM, *args: Any) -> Any:
    return await asyncio.to_thread(llm.generate, *args, use_tqdm=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "n": 2},
        {"presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5},
        {"max_tokens": 4, "min_tokens": 2, "ignore_eos": True, "seed": -9},
        {"stop": ("x", "yz"), "stop_token_ids": (7,), "include_stop_str_in_output": True},
        {"skip_special_tokens": False},
        {"logit_bias": {5: 2.0, 9: -3.0}, "allowed_token_ids": (5, 9)},
        {"repetition_detection": RepetitionDetection(4, 2, 3)},
        {"structured_outputs": StructuredOutput.of(json={"type": "object"})},
        {"structured_outputs": StructuredOutput.of(choice=["a", "b"])},
        {"structured_outputs": StructuredOutput.of(json={}, disable_any_whitespace=True)},
        {"structured_outputs": StructuredOutput.of(json_object=True)},
        {"structured_outputs": StructuredOutput.of(regex="a+")},
    ],
)
async def test_parameters_arrive_as_they_are(
    llm: LLM, backend: FakeBackend, fields: dict[str, Any]
) -> None:
    params = SamplingParams(**{"seed": 11, "max_tokens": 9} | fields)
    await generate(llm, [[40, 41]], params)
    assert backend.request.sampling == params
    assert backend.request.prompt_token_ids == (40, 41)


async def test_no_max_tokens_is_what_the_length_leaves(llm: LLM, backend: FakeBackend) -> None:
    await generate(llm, [[40] * 6], SamplingParams(max_tokens=None))
    assert backend.request.sampling.max_tokens == 250
    await generate(llm, [[40] * 6], SamplingParams(max_tokens=5000, min_tokens=400))
    assert backend.request.sampling.max_tokens == 250


async def test_outputs(llm: LLM, backend: FakeBackend, tokenizer: Tokenizer) -> None:
    text = "Hello world"
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompts: list[Any] = ["Hi", [40, 41], {"prompt": "ab", "prompt_token_ids": [50]}]
    params = SamplingParams(n=2, logprobs=2, prompt_logprobs=1)
    outputs = await generate(llm, prompts, params)
    assert [output.prompt for output in outputs] == ["Hi", None, "ab"]
    assert [output.prompt_token_ids for output in outputs[1:]] == [[40, 41], [50]]
    assert all(output.num_cached_tokens == 2 and output.finished for output in outputs)
    first = outputs[1].outputs[0]
    assert (first.index, first.text, first.token_ids) == (0, text, ids)
    assert first.finish_reason == "length"
    assert first.logprobs is not None
    assert first.cumulative_logprob == sum(
        entry[token_id].logprob for entry, token_id in zip(first.logprobs, ids, strict=True)
    )
    for entry, token_id in zip(first.logprobs, ids, strict=True):
        assert next(iter(entry)) == token_id
        for other, logprob in entry.items():
            assert logprob.decoded_token == tokenizer.token_bytes(other).decode(errors="replace")
            assert logprob.rank is not None
    scored = outputs[1].prompt_logprobs
    assert scored is not None
    assert scored[0] is None
    assert scored[1][41] == Logprob(-41.0, 2, tokenizer.token_bytes(41).decode())
    seeds = [stream.request.sampling.seed for stream in backend.streams]
    assert len(set(seeds)) == 3


async def test_seeds_are_those_of_the_same_calls_in_process(llm: LLM, server: str) -> None:
    import random

    expected = random.Random(3).getrandbits(63)
    assert isinstance(llm, RemoteLLM)
    assert llm._resolved(SamplingParams()).seed == expected


async def test_chat_and_tokenizer(llm: LLM, backend: FakeBackend, tokenizer: Tokenizer) -> None:
    (output,) = await asyncio.to_thread(llm.chat, CHAT, use_tqdm=False)
    assert output.prompt == tokenizer.render_chat(CHAT, add_generation_prompt=True)
    assert output.prompt_token_ids == tokenizer.encode_chat(CHAT, add_generation_prompt=True)
    assert backend.request.prompt_token_ids == tuple(output.prompt_token_ids)
    remote = llm.get_tokenizer()
    special = next(iter(tokenizer.special_ids))
    for skip in (True, False):
        text = await asyncio.to_thread(remote.decode, [50, special], skip_special_tokens=skip)
        assert text == tokenizer.decode([50, special], skip_special_tokens=skip)
    assert await asyncio.to_thread(remote.encode, "a b") == tokenizer.encode("a b")


async def test_beams(llm: LLM, tokenizer: Tokenizer) -> None:
    """The backend's likeliest token is always the first of "Hello world"."""
    best = tokenizer.encode("Hello world", add_special_tokens=False)[0]
    (output,) = await asyncio.to_thread(llm.beam_search, [[40]], BeamSearchParams(2, 2))
    first, second = output.sequences
    assert first.tokens == [40, best, best]
    assert first.text == tokenizer.decode(first.tokens)
    assert (first.cum_logprob, first.finish_reason) == (-1.0, "length")
    assert second.cum_logprob == -2.0


async def test_embeddings_and_scores(
    server: str, backend: FakeBackend, model: ServedModel, tokenizer: Tokenizer
) -> None:
    backend.served = (replace(model, name="pooler", pooling=PoolingInfo(PoolingTask.EMBED, 4)),)
    llm = await asyncio.to_thread(LLM, base_url=f"http://{server}", api_key="key")
    ids = [PoolingInput(tuple(tokenizer.encode("Hi"))), PoolingInput((40, 41))]
    found = await asyncio.to_thread(llm.embed, ["Hi", [40, 41]], use_tqdm=False)
    for output, one in zip(found, ids, strict=True):
        expected = np.array(embedding(one, 4), np.float32)
        assert np.array_equal(output.outputs.embedding, expected)
    assert [output.prompt_token_ids for output in found] == [[], [40, 41]]
    params = PoolingParams(truncate_prompt_tokens=1, use_activation=False)
    await asyncio.to_thread(llm.embed, "Hi there", pooling_params=params, use_tqdm=False)
    assert len(backend.pooled[-1].inputs[0].token_ids) == 1
    assert backend.pooled[-1].use_activation is False
    texts = [f"text {number}" for number in range(70)]
    scores = await asyncio.to_thread(llm.score, texts[0], texts, use_tqdm=False)
    assert len({output.request_id for output in scores}) == 70
    vectors = [embedding(PoolingInput(tuple(tokenizer.encode(text))), 4) for text in texts]
    for output, vector in zip(scores, vectors, strict=True):
        expected_score = cosine(np.array(vectors[0]), np.array(vector))
        assert output.outputs.score == pytest.approx(expected_score, abs=1e-5)
    with pytest.raises(InvalidRequest, match="1:1, 1:N or N:N"):
        await asyncio.to_thread(llm.score, texts[:2], texts[:3])
    with pytest.raises(InvalidRequest):
        await generate(llm, ["Hi"])
    await asyncio.to_thread(llm.close)


async def test_defaults(llm: LLM, tokenizer: Tokenizer) -> None:
    defaults = await asyncio.to_thread(llm.get_default_sampling_params)
    assert defaults == SamplingParams(**tokenizer.sampling_defaults)  # type: ignore[arg-type]


async def test_errors(llm: LLM, backend: FakeBackend, server: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await generate(llm, ["ok", [40] * 999])
    assert caught.value.cause is Cause.CONTEXT_LENGTH_EXCEEDED
    with pytest.raises(InvalidRequest) as caught:
        await generate(llm, ["a"], SamplingParams(temperature=50.0))
    assert caught.value.param == "temperature"
    backend.refuse = BatonError(Cause.INTERNAL, "oops")
    with pytest.raises(BatonError) as failed:
        await generate(llm, ["a"])
    assert failed.value.cause is Cause.INTERNAL
    with pytest.raises(InvalidRequest) as caught:
        await asyncio.to_thread(LLM, base_url=f"http://{server}", api_key="wrong")
    assert caught.value.cause is Cause.UNAUTHENTICATED
    with pytest.raises(InvalidRequest) as caught:
        await asyncio.to_thread(LLM, "nope", base_url=f"http://{server}", api_key="key")
    assert caught.value.cause is Cause.MODEL_NOT_FOUND
    with pytest.raises(ValueError, match="the fleet decides: dtype"):
        await asyncio.to_thread(LLM, base_url=f"http://{server}", dtype="float32")
    with pytest.raises(BatonError) as failed:
        await asyncio.to_thread(LLM, base_url="http://127.0.0.1:9")
    assert failed.value.cause is Cause.NO_WORKER
    await asyncio.to_thread(llm.close)
    with pytest.raises(RuntimeError, match="closed"):
        await generate(llm, ["a"])
