"""The exact gate in one process: real engines on a tiny random model, the local transport, and the
tokens of an aggregated run, whatever happens on the way."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from baton.engine.commands import AddLocal
from baton.engine.events import LegScored
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
    SamplingParams,
    StructuredKind,
    StructuredOutput,
    TokenChunk,
)
from tests.engine.tiny_models import make_core
from tests.tiny_tokenizer import tiny_tokenizer
from tests.worker import gate
from tests.worker.fleet import Client
from tests.worker.gate import (
    BLOCK_SIZES,
    EOS,
    GREEDY,
    PROMPT_LEN,
    SAMPLINGS,
    SCHEMA,
    SEEDED,
    Oracle,
    Runners,
    cache,
    on_the_wire,
    pair,
    prompt,
    worker,
    workers,
)

runners, oracle = gate.runners, gate.oracle


# ── the matrix ───────────────────────────────────────────────────────────────────────────────────


HITS = {"none": 0, "part": 32, "full": PROMPT_LEN}


def matrix() -> Iterator[Any]:
    """Any two of the three values in each combination; all three together take longer."""
    for p, hit_on_p in enumerate(HITS):
        for d, hit_on_d in enumerate(HITS):
            for b, sizes in enumerate(BLOCK_SIZES):
                marks = () if (p + d + b) % 3 == 0 else (pytest.mark.slow,)
                id_ = f"{hit_on_p}-{hit_on_d}-{sizes}"
                yield pytest.param(hit_on_p, hit_on_d, sizes, marks=marks, id=id_)


@pytest.mark.parametrize(("hit_on_p", "hit_on_d", "block_sizes"), list(matrix()))
async def test_prefix_hits_and_samplings(
    runners: Runners, oracle: Oracle, hit_on_p: str, hit_on_d: str, block_sizes: tuple[int, int]
) -> None:
    client = Client()
    async with pair(runners, block_sizes) as (p, d):
        for number, (name, sampling) in enumerate(SAMPLINGS.items()):
            tokens = prompt(PROMPT_LEN, seed=number)
            await cache(p, client, tokens[: HITS[hit_on_p]])
            await cache(d, client, tokens[: HITS[hit_on_d]])
            request = client.request(tokens, SamplingParams(**sampling))
            answer = await client.disaggregated(p, d, request)
            assert (answer.token_ids, on_the_wire(answer.logprobs)) == oracle(request), name
            assert answer.num_cached_on_d == HITS[hit_on_d]
            assert answer.num_cached_on_p == min(HITS[hit_on_p], PROMPT_LEN - block_sizes[0])
            assert answer.stats is not None
            assert answer.stats.num_tokens == PROMPT_LEN - HITS[hit_on_d]
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
