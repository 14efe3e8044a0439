"""Share and Advance: a running leg's KV is held for another worker, and a leg goes on behind tokens
that it has not sampled."""

from dataclasses import replace

import pytest

from baton.engine.commands import (
    AddDecode,
    Advance,
    ComputeHere,
    KVFailed,
    KVImported,
    Pin,
    Retain,
    Share,
)
from baton.engine.events import KVReserved, LegAdmitted, LegFailed, LegPinned, LegRefused
from baton.errors import Cause
from baton.types import LegId, Request
from tests.engine.driver import Driver, leg_id, prompt, request

SHARED = LegId("shared", 9)


def run_for(driver: Driver, leg: LegId, num_tokens: int) -> None:
    while min(len(driver.tokens[leg, c]) for c in (0,)) < num_tokens:
        driver.step()


def committed(driver: Driver, r: Request, num_tokens: int) -> Request:
    outputs = tuple(driver.expected(r, c)[:num_tokens] for c in range(r.sampling.n))
    return replace(r, output_token_ids=outputs)


def share(driver: Driver, leg: LegId, known: Request) -> None:
    driver.apply(Share(SHARED, known, leg))
    driver.step()


def test_full_blocks_of_prompt_and_output_are_held_and_nothing_is_computed() -> None:
    driver = Driver()
    r = request("l", prompt(40), max_tokens=60)
    leg = driver.local(r)
    run_for(driver, leg, 30)
    free = driver.core.snapshot().free_blocks
    share(driver, leg, committed(driver, r, 28))
    event = driver.last(LegAdmitted, SHARED)
    assert (event.num_tokens, event.num_cached_tokens, len(event.block_ids)) == (64, 64, 4)
    assert driver.core.snapshot().free_blocks == free, "it needs no room"
    want = driver.model.chain(None, (*r.prompt_token_ids, *driver.expected(r)[:24]))
    assert driver.kv_of(SHARED) == want
    driver.run()
    driver.assert_complete(leg, r)
    assert driver.kv_of(SHARED) == want, "kept when the leg has ended"
    driver.release(SHARED)
    driver.assert_idle()


def test_a_shared_lease_is_retained_pinned_and_quarantined_like_any() -> None:
    driver = Driver()
    r = request("l", prompt(40), max_tokens=30)
    leg = driver.local(r)
    run_for(driver, leg, 10)
    share(driver, leg, committed(driver, r, 9))
    driver.apply(Retain(SHARED))
    driver.apply(Pin(SHARED))
    driver.run()
    assert driver.of(LegPinned, SHARED)
    driver.release(SHARED, in_flight=True)
    assert driver.core.snapshot().num_quarantined_blocks == 3


@pytest.mark.parametrize("why", ["no full block", "not running", "other choice"])
def test_nothing_to_share(why: str) -> None:
    driver = Driver()
    r = request("l", prompt(9 if why == "no full block" else 40), n=2, max_tokens=30)
    leg = driver.local(r)
    run_for(driver, leg, 2)
    known = committed(driver, r, 2)
    if why == "other choice":
        driver.abort(leg, 1)
        known = replace(known, finished_choices=frozenset({0}))
    share(driver, LegId("x", 1) if why == "not running" else leg, known)
    assert driver.of(LegRefused, SHARED)


def test_ids_that_it_does_not_run() -> None:
    driver = Driver()
    r = request("l", prompt(40), max_tokens=30)
    leg = driver.local(r)
    run_for(driver, leg, 2)
    share(driver, leg, replace(r, prompt_token_ids=(*prompt(39), 11)))
    assert not driver.of(LegFailed, SHARED), "they differ behind the last full block"
    driver.release(SHARED)
    share(driver, leg, replace(r, prompt_token_ids=(11, *prompt(40)[1:])))
    assert driver.last(LegFailed, SHARED).cause is Cause.TOKENS_MISMATCH


# ── the other side ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("n", "num_fetched"), [(1, 64), (1, 48), (1, 32), (3, 32), (3, 16)])
def test_what_was_fetched_is_not_computed_again(n: int, num_fetched: int, block_size: int) -> None:
    driver = Driver(block_size=block_size)
    r = request("d", prompt(40), n=n, max_tokens=60, temperature=1.0, seed=3)
    known = committed(driver, r, 30)
    leg = leg_id("d")
    driver.apply(AddDecode(leg, known, num_fetched))
    driver.step()
    event = driver.last(KVReserved, leg)
    assert (event.num_tokens, event.num_cached_tokens) == (num_fetched, 0)
    values = driver.model.chain(None, known.prompt_token_ids + known.committed(0))[:num_fetched]
    driver.import_kv(event.block_ids, 0, values)
    driver.apply(KVImported(leg, ()))
    driver.run()
    driver.assert_complete(leg, known)
    starts = [row.start for step in driver.runner.steps for row in step]
    assert min(starts) == num_fetched
    per_choice = 60 - 1 if n > 1 else 40 + 60 - 1 - num_fetched
    assert driver.runner.num_tokens_computed == n * per_choice + (40 - num_fetched) * (n > 1)
    driver.assert_idle()


def test_half_a_fetch_is_kept_and_the_rest_computed() -> None:
    driver = Driver()
    r = request("d", prompt(40), max_tokens=40)
    known = committed(driver, r, 30)
    leg = leg_id("d")
    driver.apply(AddDecode(leg, known, 64))
    driver.step()
    values = driver.model.chain(None, known.shared_token_ids)[:50]
    driver.import_kv(driver.last(KVReserved, leg).block_ids, 0, values)
    driver.apply(KVFailed(leg, 50), ComputeHere(leg))
    driver.run()
    driver.assert_complete(leg, known)
    assert driver.runner.num_tokens_computed == 79 - 50


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_own", [0, 3, 12])
def test_it_goes_on_behind_what_another_worker_said(n: int, num_own: int) -> None:
    """In one chunk, and without saying those tokens."""
    driver = Driver()
    r = request("l", prompt(40), n=n, max_tokens=40, temperature=1.0, seed=3)
    leg = driver.local(r)
    driver.run_until_decoding()
    while len(driver.tokens[leg, n - 1]) < num_own:
        driver.step()
    known = committed(driver, r, 20)
    num_said = {c: len(driver.tokens[leg, c]) for c in range(n)}
    steps = len(driver.runner.steps)
    driver.apply(Advance(leg, known.output_token_ids))
    driver.tokens.clear()
    driver.first.clear()
    driver.run()
    for choice in range(n):
        assert tuple(driver.tokens[leg, choice]) == driver.expected(r, choice)[20:]
        assert driver.first[leg, choice] == 20 > num_said[choice]
    assert len(driver.runner.steps) - steps == 20
    driver.assert_idle()


@pytest.mark.parametrize("wrong", ["another id", "outside the vocabulary", "too few choices"])
def test_it_does_not_go_on_behind_what_cannot_be(wrong: str) -> None:
    driver = Driver()
    r = request("l", prompt(40), n=2, max_tokens=40, temperature=1.0, seed=3)
    leg = driver.local(r)
    run_for(driver, leg, 5)
    first, second = committed(driver, r, 8).output_token_ids
    outputs = {
        "another id": ((first[0] ^ 1, *first[1:]), second),
        "outside the vocabulary": ((*first, driver.config.vocab_size), second),
        "too few choices": (first,),
    }[wrong]
    driver.apply(Advance(leg, outputs))
    driver.step()
    expected = Cause.TOKENS_MISMATCH if wrong == "another id" else Cause.INVALID_REQUEST
    assert driver.last(LegFailed, leg).cause is expected
