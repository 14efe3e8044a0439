"""The exact gate in one process: real engines on a tiny random model, the local transport, and the
tokens of an aggregated run, whatever happens on the way."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from baton.engine.commands import AddLocal
from baton.engine.events import LegFailed, LegScored, LegTokens
from baton.engine.runner import ModelRunner
from baton.errors import Cause
from baton.kvtransfer.local import LocalNetwork
from baton.messages import (
    Abort,
    Bound,
    ComputeLocally,
    Failed,
    Imported,
    KvFailed,
    Rebind,
    Release,
    Submit,
)
from baton.types import (
    FinishReason,
    LegId,
    Logprobs,
    RepetitionDetection,
    Request,
    SamplingParams,
    StructuredKind,
    StructuredOutput,
    TokenChunk,
)
from tests.engine.tiny_models import load_tiny_runner, make_core, random_prompts, save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.worker.fleet import Client, LocalWorker, start_worker

CHUNK_TOKENS = 32  # so that most prompts take several steps
EOS = (2,)
PROMPT_LEN = 96  # a multiple of both block sizes
GREEDY = {"temperature": 0.0, "seed": 0, "max_tokens": 10, "ignore_eos": True}
SEEDED = {"temperature": 1.0, "seed": 5, "max_tokens": 10, "ignore_eos": True}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"enum": [1, True, None]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "two choices": {**SEEDED, "n": 2},
    "four choices": {**SEEDED, "n": 4, "top_p": 0.9},
    "truncated": {**SEEDED, "top_k": 20, "min_p": 0.01},
    "penalties": {**SEEDED, "frequency_penalty": 0.8, "repetition_penalty": 1.4, "n": 2},
    "logprobs": {**SEEDED, "logprobs": 4, "presence_penalty": 0.5},
    "biased": {**SEEDED, "logit_bias": dict.fromkeys(range(0, 250, 2), -100) | {7: 4.5}, "n": 2},
    "few allowed": {
        **SEEDED,
        "allowed_token_ids": range(40, 60),
        "n": 2,
        "logprobs": 3,
        "logprob_token_ids": (41, 7),
    },
    "bad words": {
        **SEEDED,
        "temperature": 0.3,
        "allowed_token_ids": range(40, 43),
        "bad_words_token_ids": [(40, 41), (42, 42), (41, 40, 41)],
        "n": 2,
    },
    "repetition": {
        **SEEDED,
        "allowed_token_ids": range(40, 43),
        "repetition_detection": RepetitionDetection(3, 2, 2),
        "max_tokens": 60,
        "n": 2,
    },
    "structured": {
        **SEEDED,
        "structured_outputs": StructuredOutput(StructuredKind.JSON_SCHEMA, SCHEMA, False),
        "logit_bias": {37: 4.0},  # a quotation mark
        "frequency_penalty": 0.2,
        "max_tokens": 60,
        "n": 2,
    },
    "may end early": {**SEEDED, "ignore_eos": False, "min_tokens": 2, "max_tokens": 30},
}
BLOCK_SIZES = [(16, 16), (16, 32), (32, 16)]


@dataclass(frozen=True)
class Runners:
    """Of one checkpoint: one KV pool per worker."""

    p: dict[int, ModelRunner]  # by block size
    d: dict[int, ModelRunner]
    second: ModelRunner  # block size 16
    oracle: ModelRunner


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runners]:
    torch.set_num_threads(1)
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen3")

    def load(block_size: int) -> ModelRunner:
        return load_tiny_runner(
            folder,
            tiny_tokenizer,
            block_size=block_size,
            dtype="float32",
            batch_invariant=True,
        )

    made = Runners({16: load(16), 32: load(32)}, {16: load(16), 32: load(32)}, load(16), load(16))
    yield made
    for runner in (*made.p.values(), *made.d.values(), made.second, made.oracle):
        runner.close()


Expected = tuple[dict[int, list[int]], dict[int, list[Logprobs]]]
Oracle = Callable[[Request], Expected]


def on_the_wire(logprobs: dict[int, list[Logprobs]]) -> dict[int, list[Logprobs]]:
    """With 32 bits, as they are in messages and in the end frame."""

    def f32(value: float) -> float:
        return float(np.float32(value))

    def pairs(entries: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        return tuple((token_id, f32(value)) for token_id, value in entries)

    return {
        choice: [
            Logprobs(f32(one.logprob), one.rank, pairs(one.top), pairs(one.asked))
            for one in entries
        ]
        for choice, entries in logprobs.items()
    }


@pytest.fixture(scope="module")
def oracle(runners: Runners) -> Oracle:
    """The same request alone in one engine, nothing cached, the whole prompt in one step."""

    def generate(request: Request) -> Expected:
        core = make_core(runners.oracle, enable_prefix_caching=False, eos_token_ids=EOS)
        leg = LegId(request.request_id, 0)
        core.apply(AddLocal(leg, request))
        token_ids: dict[int, list[int]] = {c: [] for c in range(request.sampling.n)}
        logprobs: dict[int, list[Logprobs]] = {c: [] for c in range(request.sampling.n)}
        while core.has_work:
            output = core.step()
            for event in output.events if output is not None else ():
                assert not isinstance(event, LegFailed), event
                if isinstance(event, LegTokens):
                    token_ids[event.chunk.choice] += event.chunk.token_ids
                    logprobs[event.chunk.choice] += event.chunk.logprobs
        return token_ids, on_the_wire(logprobs)

    return generate


@asynccontextmanager
async def workers(*made: Coroutine[Any, Any, LocalWorker]) -> AsyncIterator[list[LocalWorker]]:
    """Checked for leaks at the end."""
    started = [await one for one in made]
    try:
        yield started
        for worker in started:
            if worker.is_open:
                await worker.assert_clean()
    finally:
        for worker in started:
            await worker.close()


@asynccontextmanager
async def pair(
    runners: Runners, block_sizes: tuple[int, int] = (16, 16)
) -> AsyncIterator[tuple[LocalWorker, LocalWorker]]:
    """P and D."""
    network = LocalNetwork()
    p, d = runners.p[block_sizes[0]], runners.d[block_sizes[1]]
    async with workers(worker(network, "p", p), worker(network, "d", d)) as (first, second):
        yield first, second


def worker(
    network: LocalNetwork, name: str, runner: ModelRunner, **options: Any
) -> Coroutine[Any, Any, LocalWorker]:
    options = {"max_num_batched_tokens": CHUNK_TOKENS, "eos_token_ids": EOS, **options}
    options.setdefault("max_num_seqs", 16)
    return start_worker(network, name, runner, **options)


def prompt(length: int, seed: int) -> list[int]:
    return random_prompts(length, seed=seed)[0]


async def cache(worker: LocalWorker, client: Client, tokens: list[int]) -> None:
    """Let the worker's prefix cache hold these."""
    if tokens:
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=1)
        await client.local(worker, client.request(tokens, sampling))


# ── the matrix ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block_sizes", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("hit_on_d", ["none", "part", "full"])
@pytest.mark.parametrize("hit_on_p", ["none", "part", "full"])
async def test_prefix_hits_and_samplings(
    runners: Runners, oracle: Oracle, block_sizes: tuple[int, int], hit_on_p: str, hit_on_d: str
) -> None:
    client = Client()
    lengths = {"none": 0, "part": 32, "full": PROMPT_LEN}
    async with pair(runners, block_sizes) as (p, d):
        for number, (name, sampling) in enumerate(SAMPLINGS.items()):
            tokens = prompt(PROMPT_LEN, seed=number)
            await cache(p, client, tokens[: lengths[hit_on_p]])
            await cache(d, client, tokens[: lengths[hit_on_d]])
            request = client.request(tokens, SamplingParams(**sampling))
            answer = await client.disaggregated(p, d, request)
            assert (answer.token_ids, on_the_wire(answer.logprobs)) == oracle(request), name
            assert answer.num_cached_on_d == lengths[hit_on_d]
            assert answer.num_cached_on_p == min(lengths[hit_on_p], PROMPT_LEN - block_sizes[0])
            assert answer.stats is not None
            assert answer.stats.num_tokens == PROMPT_LEN - lengths[hit_on_d]
            assert answer.stats.num_bytes > 0  # the end frame at least
            if hit_on_d != "full":
                assert answer.stats.num_bytes > answer.stats.num_tokens * 100


@pytest.mark.parametrize("block_sizes", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 31, 33, 100])
async def test_prompt_lengths(
    runners: Runners, oracle: Oracle, block_sizes: tuple[int, int], length: int
) -> None:
    client = Client()
    async with pair(runners, block_sizes) as (p, d):
        for number, name in enumerate(("greedy", "four choices")):
            request = client.request(
                prompt(length, seed=100 + number), SamplingParams(**SAMPLINGS[name])
            )
            answer = await client.disaggregated(p, d, request)
            assert answer.token_ids == oracle(request)[0]


async def test_many_at_once(runners: Runners, oracle: Oracle) -> None:
    client = Client()
    async with pair(runners, (16, 32)) as (p, d):
        requests = [
            client.request(prompt(20 + 9 * i, seed=200 + i), SamplingParams(**sampling))
            for i, sampling in enumerate(SAMPLINGS.values())
        ]
        answers = await asyncio.gather(*(client.disaggregated(p, d, r) for r in requests))
        for request, answer in zip(requests, answers, strict=True):
            assert answer.token_ids == oracle(request)[0]


# ── first-token cases ────────────────────────────────────────────────────────────────────────────


async def test_everything_finishes_on_the_first_token(runners: Runners, oracle: Oracle) -> None:
    """No D is bound at all; and a Bind that came early is aborted."""
    client = Client()
    async with pair(runners) as (p, d):
        request = client.request(prompt(40, 1), SamplingParams(**{**SEEDED, "max_tokens": 1}))
        answer = client.answer(request)
        p_leg = await client.prefill(p, answer)
        d_leg = client.bind(p, d, answer)
        await client.first_tokens(p, p_leg, answer)
        assert answer.finished == {0}
        assert answer.token_ids == oracle(request)[0]
        d.send(Abort(d_leg))
        p.send(Release(p_leg))


@pytest.mark.parametrize("bound_early", [True, False])
async def test_one_of_two_choices_finishes_on_the_first_token(
    runners: Runners, oracle: Oracle, bound_early: bool
) -> None:
    client = Client()
    probe = client.request(prompt(40, 2), SamplingParams(**{**SEEDED, "n": 2}))
    first = oracle(probe)[0][0][0]
    assert first != oracle(probe)[0][1][0]
    sampling = replace(probe.sampling, stop_token_ids=(first,))
    async with pair(runners, (16, 32)) as (p, d):
        request = client.request(probe.prompt_token_ids, sampling)
        answer = client.answer(request)
        p_leg = await client.prefill(p, answer)
        if bound_early:
            d_leg = client.bind(p, d, answer)
            await client.first_tokens(p, p_leg, answer)
        else:
            await client.first_tokens(p, p_leg, answer)
            d_leg = client.bind(p, d, answer)
        assert answer.finished == {0}
        await client.imported(d, d_leg, answer)
        await client.tokens(d, d_leg, answer)
        assert answer.token_ids == oracle(request)[0]
        p.send(Release(p_leg))


async def test_constraints_hold_from_the_first_token_on(runners: Runners) -> None:
    """The first one is drawn on P, the others on D."""
    client = Client()
    async with pair(runners) as (p, d):
        for number in range(4):
            tokens = prompt(40 + number, number)
            request = client.request(tokens, SamplingParams(**SAMPLINGS["bad words"]))
            answer = await client.disaggregated(p, d, request)
            for ids in answer.token_ids.values():
                assert set(ids) <= {40, 41, 42}
                text = " ".join(map(str, ids))
                assert not any(word in text for word in ("40 41", "42 42"))


async def test_structured_output_is_what_was_asked_for(runners: Runners) -> None:
    """On both workers: P masks the first token, D the rest, from the committed ones on."""
    client, tokenizer = Client(), tiny_tokenizer()
    async with pair(runners) as (p, d):
        sampling = SamplingParams(**SAMPLINGS["structured"])
        requests = [client.request(prompt(30 + i, i), sampling) for i in range(4)]
        answers = await asyncio.gather(*(client.disaggregated(p, d, r) for r in requests))
        for answer in answers:
            for ids in answer.token_ids.values():
                assert ids[-1] in EOS
                jsonschema.validate(json.loads(tokenizer.decode(ids)), json.loads(SCHEMA))


async def test_a_bad_grammar_is_refused_by_the_worker_too(runners: Runners) -> None:
    """And what comes behind it is served; nothing is held."""
    client = Client()
    async with pair(runners) as (p, _):
        bad = StructuredOutput(StructuredKind.REGEX, "((")
        sampling = SamplingParams(**SEEDED, structured_outputs=bad)
        leg = client.leg(request := client.request(prompt(20, 1), sampling))
        p.send(Submit(leg, request))
        failed = await p.expect(leg, Failed)
        assert failed.cause is Cause.INVALID_REQUEST
        p.send(Abort(leg))
        await client.local(p, client.request(prompt(20, 1), SamplingParams(**SEEDED)))


async def test_an_abort_while_the_grammar_is_compiled(runners: Runners) -> None:
    client = Client()
    async with pair(runners) as (p, _):
        spec = StructuredOutput(StructuredKind.REGEX, "[a-z]{1,40}x")
        sampling = SamplingParams(**SEEDED, structured_outputs=spec)
        leg = client.leg(request := client.request(prompt(20, 1), sampling))
        assert spec not in runners.p[16].grammars
        p.send(Submit(leg, request))
        p.send(Abort(leg))
        assert spec not in runners.p[16].grammars, "it is still to come"


async def test_prompt_scores_come_from_p_and_are_those_of_an_aggregated_run(
    runners: Runners,
) -> None:
    """Although P has the prompt in its cache; and the request that follows is served from it."""
    client, tokens = Client(), prompt(PROMPT_LEN, 77)
    sampling = SamplingParams(**GREEDY, prompt_logprobs=3)
    request = client.request(tokens, sampling)
    core = make_core(runners.oracle, enable_prefix_caching=False)
    core.apply(AddLocal(LegId("o", 0), request))
    expected: list[Logprobs] = []
    while core.has_work:
        output = core.step()
        for event in output.events if output is not None else ():
            if isinstance(event, LegScored):
                expected += event.logprobs
    async with pair(runners) as (p, d):
        await cache(p, client, tokens)
        scores: list[Logprobs] = []
        async for start, logprobs in p.worker.score(request):
            assert start == len(scores) + 1
            scores += logprobs
        assert scores == expected
        assert len(scores) == PROMPT_LEN - 1
        plain = client.request(tokens, SamplingParams(**GREEDY))
        answer = await client.disaggregated(p, d, plain)
        assert answer.num_cached_on_p > 0
        assert answer.stats is not None
        assert answer.stats.num_bytes > 0


async def test_a_repetition_ends_a_choice(runners: Runners) -> None:
    client = Client()
    async with pair(runners) as (p, d):
        sampling = SamplingParams(**SAMPLINGS["repetition"])
        answer = await client.disaggregated(p, d, client.request(prompt(50, 5), sampling))
        for ids in answer.token_ids.values():
            assert any(ids[-n:] == ids[-2 * n : -n] for n in (2, 3))
            assert len(ids) < 60


# ── trouble ──────────────────────────────────────────────────────────────────────────────────────


async def test_preempted_on_d(runners: Runners, oracle: Oracle) -> None:
    """Sequences that outgrow D's pool lose their blocks and are computed again."""
    client, network = Client(), LocalNetwork()
    sampling = SamplingParams(**{**SEEDED, "max_tokens": 60, "n": 2})
    requests = [client.request(prompt(30 + i, seed=300 + i), sampling) for i in range(3)]
    async with workers(
        worker(network, "p", runners.p[16]), worker(network, "d", runners.d[16], num_blocks=14)
    ) as (p, d):
        answers = await asyncio.gather(*(client.disaggregated(p, d, r) for r in requests))
        for request, answer in zip(requests, answers, strict=True):
            assert answer.token_ids == oracle(request)[0]
        assert d.recorder.num_preempted > 0


@pytest.mark.parametrize("name", ["greedy", "four choices", "penalties"])
async def test_p_is_lost_during_the_fetch(runners: Runners, oracle: Oracle, name: str) -> None:
    """D keeps what it verified and computes the rest itself."""
    client, network = Client(), LocalNetwork()
    async with workers(
        worker(network, "p", runners.p[16], max_num_batched_tokens=16),
        worker(network, "d", runners.d[32]),
    ) as (p, d):
        request = client.request(prompt(300, 7), SamplingParams(**SAMPLINGS[name]))
        answer = client.answer(request)
        await client.prefill(p, answer)
        d_leg = client.bind(p, d, answer)
        await p.close()  # its prefill takes many more steps
        failed = await d.expect(d_leg, KvFailed)
        assert failed.valid_tokens < 300
        d.send(ComputeLocally(d_leg, answer.resumed()))
        await client.tokens(d, d_leg, answer)
        assert answer.token_ids == oracle(request)[0]


async def test_a_fetch_that_broke_is_fetched_again(runners: Runners, oracle: Oracle) -> None:
    """The hole only: what was verified is not moved twice."""
    client, network = Client(), LocalNetwork()
    async with workers(
        worker(network, "p", runners.p[16], max_num_batched_tokens=16),
        worker(network, "d", runners.d[16]),
    ) as (p, d):
        request = client.request(prompt(300, 8), SamplingParams(**SEEDED))
        answer = client.answer(request)
        p_leg = await client.prefill(p, answer)
        d_leg = client.bind(p, d, answer)
        await d.expect(d_leg, Bound)
        d.worker.fetches.cancel(d_leg)  # as if the link had broken
        failed = await d.expect(d_leg, KvFailed)
        info = p.worker.info
        assert answer.ticket is not None
        d.send(Rebind(d_leg, answer.ticket, info.transports, info.host_id))
        stats = (await d.expect(d_leg, Imported)).stats
        assert stats.num_tokens == 300 - failed.valid_tokens
        await client.first_tokens(p, p_leg, answer)
        await client.tokens(d, d_leg, answer)
        assert answer.token_ids == oracle(request)[0]
        p.send(Release(p_leg))


@pytest.mark.parametrize(
    "name", ["greedy", "two choices", "penalties", "logprobs", "bad words", "structured"]
)
@pytest.mark.parametrize("after", [1, 4])
async def test_d_is_lost_and_another_takes_over(
    runners: Runners, oracle: Oracle, name: str, after: int
) -> None:
    """The second D attaches to the same lease, committed output included: no prefill again."""
    client, network = Client(), LocalNetwork()
    async with workers(
        worker(network, "p", runners.p[16]),
        worker(network, "d", runners.d[32]),
        worker(network, "d2", runners.second),
    ) as (p, first, second):
        request = client.request(prompt(70, 9), SamplingParams(**SAMPLINGS[name]))
        answer = client.answer(request)
        p_leg = await client.prefill(p, answer)
        d_leg = client.bind(p, first, answer)
        await client.imported(first, d_leg, answer)
        await client.tokens(first, d_leg, answer, at_least=after)
        first.lose_session()
        num_prefilled = p.recorder.num_prefill_tokens
        d_leg = client.bind(p, second, answer)
        await client.imported(second, d_leg, answer)
        assert answer.stats is not None
        assert answer.stats.num_tokens == 70
        await client.tokens(second, d_leg, answer)
        assert (answer.token_ids, on_the_wire(answer.logprobs)) == oracle(request)
        assert p.recorder.num_prefill_tokens == num_prefilled
        p.send(Release(p_leg))


async def test_finish_reasons_and_stop_ids(runners: Runners, oracle: Oracle) -> None:
    client = Client()
    probe = client.request(prompt(40, 3), SamplingParams(**SEEDED))
    stop_id = oracle(probe)[0][0][4]
    index = oracle(probe)[0][0].index(stop_id)
    async with pair(runners) as (p, d):
        request = client.request(
            probe.prompt_token_ids, replace(probe.sampling, stop_token_ids=(stop_id,))
        )
        answer = client.answer(request)
        p_leg = await client.prefill(p, answer)
        d_leg = client.bind(p, d, answer)
        await client.imported(d, d_leg, answer)
        chunk = None
        while not answer.is_complete:
            chunk = await d.expect(d_leg, TokenChunk)
            answer.commit(chunk)
        assert chunk is not None
        assert chunk.finish_reason is FinishReason.STOP
        assert chunk.stop_token_id == stop_id
        assert len(answer.token_ids[0]) == index + 1
        p.send(Release(p_leg))
