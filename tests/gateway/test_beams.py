"""Beam search in the gateway: against every sequence there is, and what it leaves behind."""

import asyncio
import itertools
import math
from collections.abc import Sequence

import httpx
import pytest

from baton.errors import BatonError, Cause
from baton.gateway.backend import ServedModel
from baton.gateway.beams import BeamStream
from baton.types import FinishReason, LegId, Logprobs, Request, SamplingParams, TokenChunk
from tests.gateway.fakes import FakeBackend, Step

EOS, VOCAB = 2, (2, 5, 6)
PROMPT = (9, 8)


def logprobs_after(token_ids: Sequence[int]) -> dict[int, float]:
    weights = {t: 1 + (hash((*token_ids, t)) % 97) for t in VOCAB}
    total = sum(weights.values())
    return {t: math.log(weight / total) for t, weight in weights.items()}


def one_token(request: Request) -> Sequence[Step]:
    assert request.sampling.max_tokens == 1
    found = sorted(logprobs_after(request.prompt_token_ids).items(), key=lambda item: -item[1])
    top = tuple(found[: request.sampling.logprobs])
    entry = Logprobs(top[0][1], 1, top)
    leg = LegId(request.request_id, 1)
    return [TokenChunk(leg, 0, 0, (top[0][0],), (entry,), FinishReason.LENGTH)]


def playing(script: object = one_token) -> FakeBackend:
    return FakeBackend(script, (ServedModel("m", 99, 99, (EOS,)),))  # type: ignore[arg-type]


def search(on: FakeBackend, width: int, max_tokens: int, penalty: float = 1.0) -> BeamStream:
    sampling = SamplingParams(n=width, max_tokens=max_tokens, seed=1, logprobs=2)
    return BeamStream(on, Request("r", PROMPT, sampling), penalty, (EOS,))


def every_sequence(max_tokens: int) -> dict[tuple[int, ...], float]:
    """What can be said in so many tokens, and its log-probability."""
    found: dict[tuple[int, ...], float] = {}
    for length in range(1, max_tokens + 1):
        for ids in itertools.product(VOCAB, repeat=length):
            ends = ids[-1] == EOS or length == max_tokens
            if EOS not in ids[:-1] and ends:
                found[ids] = sum(
                    logprobs_after((*PROMPT, *ids[:i]))[token] for i, token in enumerate(ids)
                )
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
async def test_a_wide_beam_finds_the_best_of_all_sequences(penalty: float) -> None:
    """Wide enough to forget nothing: 8 beams are every beginning of 3 tokens."""
    width, max_tokens = 12, 4
    chunks = [chunk async for chunk in search(playing(), width, max_tokens, penalty)]
    scored = sorted(
        ((value / len(ids) ** penalty, ids) for ids, value in every_sequence(max_tokens).items()),
        reverse=True,
    )
    assert [chunk.token_ids for chunk in chunks] == [ids for _, ids in scored[:width]]
    assert [chunk.choice for chunk in chunks] == list(range(width))
    for chunk in chunks:
        ended = chunk.token_ids[-1] == EOS
        assert chunk.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert len(chunk.logprobs) == len(chunk.token_ids)


async def test_every_step_is_an_ordinary_request_for_one_token() -> None:
    on = playing()
    chunks = [chunk async for chunk in search(on, 2, 5)]
    assert len(chunks) == 2
    assert len({stream.request.request_id for stream in on.streams}) == len(on.streams) <= 1 + 2 * 4
    assert all(stream.aborted.is_set() for stream in on.streams)
    assert on.streams[0].request.prompt_token_ids == PROMPT


async def test_what_counts_reaches_every_step() -> None:
    on = playing()
    sampling = SamplingParams(
        n=2, max_tokens=3, seed=1, allowed_token_ids=(2, 5), logit_bias={5: 1.0}, top_k=3
    )
    async for _ in BeamStream(on, Request("r", PROMPT, sampling), 1.0, (EOS,)):
        pass
    for stream in on.streams:
        asked = stream.request.sampling
        assert (asked.allowed_token_ids, asked.logit_bias) == ((2, 5), ((5, 1.0),))
        assert asked.processed_logprobs
        assert (asked.top_k, asked.temperature) == (0, 0.0)


async def test_a_failure_ends_it_and_its_siblings() -> None:
    def fails_later(request: Request) -> Sequence[Step]:
        if len(request.prompt_token_ids) > len(PROMPT):
            return [BatonError(Cause.WORKER_LOST, "gone")]
        return one_token(request)

    on = playing(fails_later)
    with pytest.raises(BatonError, match="gone"):
        await anext(search(on, 3, 5))
    assert all(stream.aborted.is_set() for stream in on.streams)


async def test_after_an_abort_it_ends_without_an_error() -> None:
    on = playing(lambda _: [asyncio.Event()])
    stream = search(on, 3, 5)
    reading = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0)
    stream.abort()
    assert await reading is None
    assert all(one.aborted.is_set() for one in on.streams)


async def test_over_http(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    def script(request: Request) -> Sequence[Step]:
        leg = LegId(request.request_id, 1)
        top = tuple((ord(c), -1.0 - i) for i, c in enumerate("abcdef"))
        entry = Logprobs(-1.0, 1, top[: request.sampling.logprobs])
        return [TokenChunk(leg, 0, 0, (top[0][0],), (entry,), FinishReason.LENGTH)]

    backend.script = script
    body = {"prompt": "Hi", "max_tokens": 3, "n": 2, "use_beam_search": True, "temperature": 0}
    response = await client.post("/v1/completions", json=body)
    answer = response.json()
    assert response.status_code == 200, answer
    assert len(answer["choices"]) == 2
    assert answer["usage"]["completion_tokens"] == 6
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    for wrong in ({"stream": True}, {"n": 17}, {"length_penalty": 99}):
        response = await client.post("/v1/completions", json=body | wrong)
        assert response.status_code == 400, wrong
    structured = {"response_format": {"type": "json_object"}}
    response = await client.post("/v1/completions", json=body | structured)
    assert response.json()["error"]["param"] == "use_beam_search"
