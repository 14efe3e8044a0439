"""A running sequence moves to another worker: the tokens of an aggregated run, no matter where the
seam is, and its KV is moved, not computed again."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from baton.errors import Cause
from baton.kvtransfer.local import LocalNetwork
from baton.messages import (
    Abort,
    ComputeLocally,
    Failed,
    NoRoom,
    Release,
    Submit,
    TokenChunk,
)
from baton.types import LegId, SamplingParams, StructuredKind, StructuredOutput
from tests.worker import gate
from tests.worker.fleet import Answer, Client, LocalWorker
from tests.worker.gate import Oracle, Runners, on_the_wire, prompt, worker, workers

runners, oracle = gate.runners, gate.oracle

LONG = 70  # tokens: what moves is still running when it has moved
SAMPLINGS = gate.SAMPLINGS | {
    "structured": {
        **gate.SEEDED,
        "structured_outputs": StructuredOutput(StructuredKind.REGEX, "([a-f][0-9]){200}", False),
        "n": 2,
    }
}
NAMES = [name for name in SAMPLINGS if name not in {"may end early", "repetition"}]


def params(name: str, **changes: Any) -> SamplingParams:
    return SamplingParams(**{**SAMPLINGS[name], "max_tokens": LONG, **changes})


async def start(client: Client, source: LocalWorker, answer: Answer, at_least: int) -> LegId:
    leg = client.leg(answer.request)
    source.send(ComputeLocally(leg, answer.request))
    await client.tokens(source, leg, answer, at_least=at_least)
    return leg


def take(source: LocalWorker, leg: LegId, answer: Answer) -> None:
    """Commit whatever has come from there."""
    inbox = source.port.inbox[leg]
    while not inbox.empty():
        message = inbox.get_nowait()
        if isinstance(message, TokenChunk):
            answer.commit(message)


async def move(
    client: Client, source: LocalWorker, target: LocalWorker, leg: LegId, answer: Answer
) -> LegId:
    """What the gateway does: share, bind, and, when the target decodes, cut over to it."""
    shared = await client.prefill(source, answer)
    assert answer.ticket is not None
    assert answer.num_cached_on_p == answer.ticket.num_tokens, "something was computed"
    assert answer.ticket.num_tokens % source.core.config.block_size == 0
    take(source, leg, answer)
    moved = client.bind(source, target, answer)
    await client.imported(target, moved, answer)
    awaited = set(answer.resumed().open_choices())
    while awaited:
        chunk = await target.expect(moved, TokenChunk)
        awaited.discard(chunk.choice)
        take(source, leg, answer)
        answer.commit(chunk)
    source.send(Abort(leg))
    source.send(Release(shared))
    target.send(ComputeLocally(moved, answer.resumed()))
    return moved


def moved_tokens(answer: Answer) -> int:
    assert answer.stats is not None
    assert answer.stats.num_bytes > answer.stats.num_tokens * 100
    return answer.stats.num_tokens


def matrix() -> Iterator[Any]:
    """Choices that share blocks with blocks of all sizes, the others with one; the rest take
    longer."""
    for number, name in enumerate(NAMES):
        for b, sizes in enumerate(gate.BLOCK_SIZES):
            is_quick = name == "four choices" or (number + b) % 3 == 0
            marks = () if is_quick else (pytest.mark.slow,)
            yield pytest.param(name, sizes, marks=marks, id=f"{name}-{sizes}")


@pytest.mark.parametrize(("name", "block_sizes"), list(matrix()))
async def test_while_it_decodes(
    runners: Runners, oracle: Oracle, name: str, block_sizes: tuple[int, int]
) -> None:
    client, network = Client(), LocalNetwork()
    first, second = runners.p[block_sizes[0]], runners.d[block_sizes[1]]
    async with workers(worker(network, "a", first), worker(network, "b", second)) as (a, b):
        for seed, (length, after) in enumerate([(64, 1), (50, 31)]):
            request = client.request(prompt(length, seed=400 + seed), params(name))
            answer = client.answer(request)
            leg = await start(client, a, answer, after)
            leg = await move(client, a, b, leg, answer)
            assert not answer.is_complete
            await client.tokens(b, leg, answer)
            assert (answer.token_ids, on_the_wire(answer.logprobs)) == oracle(request), seed
            size = block_sizes[0]
            if request.sampling.n == 1:
                assert moved_tokens(answer) >= (length + after - 1) // size * size
            else:
                assert moved_tokens(answer) == length // size * size


async def test_there_and_back(runners: Runners, oracle: Oracle) -> None:
    """Again and again, between the same two: what each still has is not moved again."""
    client, network = Client(), LocalNetwork()
    async with workers(
        worker(network, "a", runners.p[16]), worker(network, "b", runners.d[16])
    ) as (a, b):
        request = client.request(prompt(40, seed=420), params("seeded", max_tokens=150))
        answer = client.answer(request)
        leg = await start(client, a, answer, 3)
        for source, target in ((a, b), (b, a), (a, b)):
            leg = await move(client, source, target, leg, answer)
            count = len(answer.token_ids[0])
            await client.tokens(target, leg, answer, at_least=count + 4)
        assert answer.num_cached_on_d >= 48
        await client.tokens(b, leg, answer)
        assert answer.token_ids == oracle(request)[0]


async def test_a_choice_that_is_over_stays_behind(runners: Runners, oracle: Oracle) -> None:
    """Of two choices one has ended: the other's output moves with its prompt."""
    client, network = Client(), LocalNetwork()
    async with workers(
        worker(network, "a", runners.p[16]), worker(network, "b", runners.d[32])
    ) as (a, b):
        request = client.request(prompt(40, seed=430), params("two choices"))
        answer = client.answer(request)
        leg = await start(client, a, answer, 30)
        answer.finished.add(0)  # a stop string
        a.send(Abort(leg, 0))
        stopped = len(answer.token_ids[0])
        leg = await move(client, a, b, leg, answer)
        assert moved_tokens(answer) >= 64
        await client.tokens(b, leg, answer)
        assert answer.token_ids[1] == oracle(request)[0][1]
        assert len(answer.token_ids[0]) <= stopped + 40


async def test_many_at_once_from_a_worker_that_drains(runners: Runners, oracle: Oracle) -> None:
    """It lets in what helps it to get rid of its work, and nothing else."""
    client, network = Client(), LocalNetwork()
    async with workers(
        worker(network, "a", runners.p[16]), worker(network, "b", runners.d[16])
    ) as (a, b):
        requests = [
            client.request(prompt(30 + i, seed=440 + i), params(name, max_tokens=120))
            for i, name in enumerate(NAMES[:6])  # that run at once, none after the others
        ]
        answers = [client.answer(request) for request in requests]
        legs = await asyncio.gather(*(start(client, a, answer, 4) for answer in answers))
        a.worker.runtime.drain()
        stranger = client.request(prompt(20, seed=450), params("greedy"))
        leg = client.leg(stranger)
        a.send(Submit(leg, stranger))
        refused = await a.receive(leg)
        assert isinstance(refused, Failed)
        assert refused.cause is Cause.DRAINING
        pairs = zip(legs, answers, strict=True)
        legs = await asyncio.gather(*(move(client, a, b, leg, answer) for leg, answer in pairs))
        for leg, answer in zip(legs, answers, strict=True):
            await client.tokens(b, leg, answer)
            assert answer.token_ids == oracle(answer.request)[0]
            assert answer.request.sampling.n > 1 or moved_tokens(answer) > 0
        async with asyncio.timeout(5):
            await a.worker.drain(5)
        assert a.worker.is_idle


async def test_nothing_to_share_yet(runners: Runners) -> None:
    """Less than a block: there is nothing that moving could save."""
    client, network = Client(), LocalNetwork()
    async with workers(worker(network, "a", runners.p[32])) as (a,):
        request = client.request(prompt(8, seed=460), params("four choices"))
        answer = client.answer(request)
        await start(client, a, answer, 2)
        leg = client.leg(request)
        a.send(Submit(leg, answer.resumed()))
        while not isinstance(message := await a.receive(leg), NoRoom):
            assert not isinstance(message, Failed)


async def test_other_ids_than_those_that_run_are_refused(runners: Runners) -> None:
    client, network = Client(), LocalNetwork()
    async with workers(worker(network, "a", runners.p[16])) as (a,):
        request = client.request(prompt(40, seed=470), params("greedy"))
        answer = client.answer(request)
        await start(client, a, answer, 12)
        other = replace(answer.resumed(), prompt_token_ids=tuple(prompt(40, seed=471)))
        leg = client.leg(request)
        a.send(Submit(leg, other))
        message = await a.receive(leg)
        while not isinstance(message, Failed):
            message = await a.receive(leg)
        assert message.cause is Cause.TOKENS_MISMATCH


async def test_the_target_must_agree_with_what_was_committed(runners: Runners) -> None:
    """A worker whose tokens differ from the committed ones does not go on from its own."""
    client, network = Client(), LocalNetwork()
    async with workers(worker(network, "a", runners.p[16])) as (a,):
        request = client.request(prompt(40, seed=480), params("greedy"))
        answer = client.answer(request)
        leg = await start(client, a, answer, 6)
        ids = answer.token_ids[0]
        wrong = replace(answer.resumed(), output_token_ids=((ids[0] ^ 1, *ids[1:]),))
        a.send(ComputeLocally(leg, wrong))
        message = await a.receive(leg)
        while isinstance(message, TokenChunk):
            message = await a.receive(leg)
        assert isinstance(message, Failed)
        assert message.cause is Cause.TOKENS_MISMATCH
