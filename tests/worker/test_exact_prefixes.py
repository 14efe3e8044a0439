"""The exact gate for prefixes by hash: a worker takes what another holds, and the tokens are those
of an aggregated run, however the fetch ends."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from baton.errors import BatonError, Cause
from baton.grants import Grant, GrantKeys
from baton.hashing import prefix_hashes, root_hash, salt_digest
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.local import LocalNetwork
from baton.messages import (
    Abort,
    Admitted,
    ComputeLocally,
    PrefixFetched,
    PrefixSource,
    Release,
    Submit,
)
from baton.types import HASH_TOKENS, LegId, Request, SamplingParams
from baton.worker import data_plane
from tests.worker.fleet import GRANT_KEYS, Answer, Client, LocalWorker
from tests.worker.gate import (
    GREEDY,
    SEEDED,
    Oracle,
    Runners,
    cache,
    oracle,
    prompt,
    runners,
    worker,
    workers,
)

__all__ = ["oracle", "runners"]

LEN = 100  # six full blocks of 16, and a part of one


@asynccontextmanager
async def three(
    runners: Runners, target_block_size: int = 16, source_block_size: int = 16
) -> AsyncIterator[tuple[LocalWorker, LocalWorker, LocalWorker]]:
    """P that computes, a worker that holds something, and D."""
    network = LocalNetwork()
    async with workers(
        worker(network, "p", runners.p[target_block_size]),
        worker(network, "s", runners.d[source_block_size]),
        worker(network, "d", runners.second),
    ) as (p, s, d):
        yield p, s, d


def held_by(
    source: LocalWorker,
    target: LocalWorker,
    request: Request,
    num_tokens: int,
    keys: GrantKeys = GRANT_KEYS,
    deadline_ms: int = 0,
    **claims: Any,
) -> PrefixSource:
    """What a gateway would say of them."""
    info = source.worker.info
    hashes = prefix_hashes(root_hash(info.fingerprint, request.salt), request.prompt_token_ids)
    fields = {
        "nonce": secrets.token_bytes(16),
        "source_incarnation": info.incarnation,
        "consumer_incarnation": target.worker.info.incarnation,
        "fingerprint": info.fingerprint,
        "salt_digest": salt_digest(request.salt),
        "last_hash": hashes[num_tokens // HASH_TOKENS - 1],
        "num_tokens": num_tokens,
        "duration_ms": 10_000,
        **claims,
    }
    grant = keys.sign(Grant(**fields))
    return PrefixSource(info.worker_id, info.transports, info.host_id, grant, 1.0, deadline_ms)


async def through(
    p: LocalWorker, d: LocalWorker, client: Client, request: Request, source: PrefixSource
) -> tuple[Answer, PrefixFetched | None]:
    """Prefilled on P with a prefix of `source`, decoded on D."""
    answer, leg = client.answer(request), client.leg(request)
    p.send(Submit(leg, request, source))
    admitted = await p.expect(leg, Admitted)
    answer.ticket, answer.num_cached_on_p = admitted.ticket, admitted.num_cached_tokens
    d_leg = client.bind(p, d, answer)
    await client.imported(d, d_leg, answer)
    await client.first_tokens(p, leg, answer)
    await client.tokens(d, d_leg, answer)
    p.send(Release(leg))
    return answer, admitted.prefix


@pytest.mark.parametrize("sampling", [GREEDY, {**SEEDED, "n": 2}], ids=["greedy", "two choices"])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16)], ids=str)
async def test_a_prefix_of_another_prefill_worker(
    runners: Runners, oracle: Oracle, sizes: tuple[int, int], sampling: dict[str, Any]
) -> None:
    client = Client()
    async with three(runners, *sizes) as (p, s, d):
        tokens = prompt(LEN, seed=1)
        await cache(s, client, tokens)
        held = LEN // sizes[1] * sizes[1]
        request = client.request(tokens, SamplingParams(**sampling))
        answer, fetched = await through(p, d, client, request, held_by(s, p, request, 96))
        assert answer.token_ids == oracle(request)[0]
        assert fetched is not None
        assert (fetched.num_tokens, fetched.cause) == (held, None)
        assert fetched.stats is not None
        assert fetched.stats.num_bytes >= held * p.worker.info.layout.token_bytes
        assert p.recorder.num_prefill_tokens == LEN - held
        assert answer.num_cached_on_p == held
        # It is P's own from now on.
        again = client.request(tokens, SamplingParams(**sampling))
        assert (await client.local(p, again)).token_ids == oracle(again)[0]
        assert p.recorder.num_prefill_tokens == LEN - held + LEN - 96 // sizes[0] * sizes[0]


async def test_what_a_decode_worker_holds_of_the_previous_turn(
    runners: Runners, oracle: Oracle
) -> None:
    client = Client()
    async with three(runners) as (p, s, d):
        first = client.request(prompt(50, seed=2), SamplingParams(**{**GREEDY, "max_tokens": 40}))
        turn = await client.disaggregated(p, d, first)
        tokens = [*first.prompt_token_ids, *turn.token_ids[0], *prompt(20, seed=3)]
        request = client.request(tokens, SamplingParams(**GREEDY))
        computed = p.recorder.num_prefill_tokens
        answer, fetched = await through(p, d, client, request, held_by(d, p, request, 80))
        assert answer.token_ids == oracle(request)[0]
        assert fetched is not None
        assert fetched.num_tokens == 80 - 48  # P had three blocks of the first prompt
        assert p.recorder.num_prefill_tokens - computed == len(tokens) - 80
        assert answer.num_cached_on_d >= 80  # and D fetches nothing of it back
        await cache(s, client, [])


async def test_a_local_leg_fetches_too(runners: Runners, oracle: Oracle) -> None:
    client = Client()
    async with three(runners) as (p, s, _):
        tokens = prompt(LEN, seed=4)
        await cache(s, client, tokens)
        request = client.request(tokens, SamplingParams(**SEEDED))
        leg, answer = client.leg(request), client.answer(request)
        p.send(ComputeLocally(leg, request, held_by(s, p, request, 96)))
        admitted = await p.expect(leg, Admitted)
        await client.tokens(p, leg, answer)
        assert answer.token_ids == oracle(request)[0]
        assert admitted.prefix is not None
        assert admitted.num_cached_tokens == admitted.prefix.num_tokens == 96


async def test_a_stale_index_costs_an_empty_answer(runners: Runners, oracle: Oracle) -> None:
    client = Client()
    async with three(runners) as (p, s, d):
        request = client.request(prompt(LEN, seed=5), SamplingParams(**GREEDY))
        answer, fetched = await through(p, d, client, request, held_by(s, p, request, 96))
        assert answer.token_ids == oracle(request)[0]
        assert fetched is not None
        assert (fetched.num_tokens, fetched.cause) == (0, Cause.LEASE_UNKNOWN)
        assert p.recorder.num_prefill_tokens == LEN


async def test_the_source_dies_midway(
    runners: Runners, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was verified before is kept."""
    monkeypatch.setattr(data_plane, "Exporter", partial(Exporter, frame_bytes=1))
    client = Client()
    async with three(runners) as (p, s, d):
        tokens = prompt(LEN, seed=6)
        await cache(s, client, tokens)
        memory = s.worker._plane.memory
        pack, num_packed = memory.pack, 0
        num_layers = p.worker.info.layout.num_layers

        def dying(*args: Any, **kwargs: Any) -> memoryview:
            nonlocal num_packed
            num_packed += 1
            if num_packed > 40 * num_layers:  # a frame holds one token of one layer
                raise BatonError(Cause.TRANSPORT_FAILED, "the source is dead")
            return pack(*args, **kwargs)

        memory.pack = dying  # type: ignore[method-assign]
        request = client.request(tokens, SamplingParams(**GREEDY))
        answer, fetched = await through(p, d, client, request, held_by(s, p, request, 96))
        assert answer.token_ids == oracle(request)[0]
        assert fetched is not None
        assert fetched.cause is Cause.TRANSPORT_FAILED
        assert 0 < fetched.num_tokens <= 40
        assert p.recorder.num_prefill_tokens == LEN - fetched.num_tokens


async def test_a_source_that_is_gone(runners: Runners, oracle: Oracle) -> None:
    client = Client()
    async with three(runners) as (p, s, d):
        request = client.request(prompt(LEN, seed=7), SamplingParams(**GREEDY))
        source = held_by(s, p, request, 96)
        await s.close()
        answer, fetched = await through(p, d, client, request, source)
        assert answer.token_ids == oracle(request)[0]
        assert fetched is not None
        assert fetched.cause is Cause.TRANSPORT_FAILED


async def test_at_the_deadline_it_computes(
    runners: Runners, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client()
    async with three(runners) as (p, s, d):
        monkeypatch.setattr(s.worker.runtime, "attach", lambda *_: None)  # it never answers
        request = client.request(prompt(LEN, seed=8), SamplingParams(**GREEDY))
        source = held_by(s, p, request, 96, deadline_ms=50)
        answer, fetched = await through(p, d, client, request, source)
        assert answer.token_ids == oracle(request)[0]
        assert fetched is not None
        assert (fetched.num_tokens, fetched.cause) == (0, Cause.DEADLINE_EXCEEDED)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"keys": GrantKeys("another cluster", ())}, Cause.TICKET_FORGED),
        ({"keys": GrantKeys("test", ("a token",))}, Cause.TICKET_FORGED),
        ({"salt_digest": bytes(32)}, Cause.TENANT_MISMATCH),
        ({"source_incarnation": bytes(16)}, Cause.LEASE_UNKNOWN),
        ({"duration_ms": 0}, Cause.TICKET_EXPIRED),
        ({"last_hash": bytes(32)}, Cause.TOKENS_MISMATCH),
    ],
    ids=["cluster", "token", "tenant", "incarnation", "expired", "prefix"],
)
async def test_a_bad_grant_gives_nothing(
    runners: Runners, oracle: Oracle, options: dict[str, Any], cause: Cause
) -> None:
    client = Client()
    async with three(runners) as (p, s, d):
        tokens = prompt(LEN, seed=9)
        await cache(s, client, tokens)
        request = client.request(tokens, SamplingParams(**GREEDY))
        source = held_by(s, p, request, 96, **options)
        answer, fetched = await through(p, d, client, request, source)
        assert answer.token_ids == oracle(request)[0]
        assert fetched is not None
        assert (fetched.num_tokens, fetched.cause) == (0, cause)


async def test_whoever_needs_the_same_prefix_waits_with_it(
    runners: Runners, oracle: Oracle
) -> None:
    """One fetch, and nobody computes the prefix; other requests are served meanwhile."""
    client = Client()
    async with three(runners) as (p, s, d):
        shared = prompt(96, seed=10)
        await cache(s, client, shared)
        asked: list[tuple[int, Any]] = []
        attach = s.worker.runtime.attach

        def hold(key: int, fetch: Any) -> None:
            asked.append((key, fetch))

        s.worker.runtime.attach = hold  # type: ignore[method-assign]
        requests = [
            client.request([*shared, *prompt(10, seed=20 + i)], SamplingParams(**GREEDY))
            for i in range(3)
        ]
        running = []
        for request in requests:
            source = held_by(s, p, request, 96)
            running.append(asyncio.create_task(through(p, d, client, request, source)))
            await asyncio.sleep(0.05)
        other = client.request(prompt(40, seed=30), SamplingParams(**GREEDY))
        assert (await client.local(p, other)).token_ids == oracle(other)[0]
        assert len(asked) == 1
        assert not any(task.done() for task in running)
        attach(*asked[0])
        results = await asyncio.gather(*running)
        for request, (answer, _) in zip(requests, results, strict=True):
            assert answer.token_ids == oracle(request)[0]
        assert [fetched is not None for _, fetched in results] == [True, False, False]
        assert p.recorder.num_prefill_tokens == 40 + 3 * 10


@pytest.mark.parametrize("with_another", [False, True])
async def test_aborted_while_it_fetches(
    runners: Runners, oracle: Oracle, with_another: bool
) -> None:
    """Nothing leaks, and whoever waited for the same prefix computes it."""
    client = Client()
    async with three(runners) as (p, s, d):
        shared = prompt(96, seed=11)
        await cache(s, client, shared)
        s.worker.runtime.attach = lambda *_: None  # type: ignore[method-assign]
        request = client.request([*shared, *prompt(10, seed=31)], SamplingParams(**GREEDY))
        leg: LegId = client.leg(request)
        p.send(Submit(leg, request, held_by(s, p, request, 96)))
        await asyncio.sleep(0.1)
        second = client.request([*shared, *prompt(10, seed=32)], SamplingParams(**GREEDY))
        waiting = None
        if with_another:
            waiting = asyncio.create_task(client.disaggregated(p, d, second))
            await asyncio.sleep(0.1)
        p.send(Abort(leg))
        if waiting is not None:
            assert (await waiting).token_ids == oracle(second)[0]
            assert p.recorder.num_prefill_tokens == 106
