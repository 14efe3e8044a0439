"""AddDecode: reserve at once, wait for the KV, join, decode; recompute nothing that came."""

from dataclasses import replace

import pytest

from baton.engine.commands import KVImported, Quiesced
from baton.engine.events import (
    KVReserved,
    LegFailed,
    LegPreempted,
    LegRefused,
)
from baton.engine.null_runner import NullModel
from baton.errors import Cause
from baton.types import FinishReason, TokenChunk
from tests.engine.driver import Driver, prompt, request


def test_it_reserves_at_once_and_waits() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = driver.reserved(r)
    event = driver.last(KVReserved, leg)
    assert (len(event.block_ids), event.num_tokens, event.num_cached_tokens) == (3, 40, 0)
    snapshot = driver.core.snapshot()
    assert (snapshot.num_waiting_for_kv, snapshot.num_running) == (1, 0)
    assert snapshot.free_blocks == 64 - 3 - 1, "the prompt and one growth block"
    assert not driver.core.has_work


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("num_prompt", [5, 16, 40, 48])
def test_it_decodes_from_index_0_and_computes_no_prompt_token(n: int, num_prompt: int) -> None:
    driver = Driver(max_num_seqs=3)
    r = request("d", prompt(num_prompt), n=n, temperature=1.0, seed=5)
    leg = driver.joined(r)
    driver.run()
    driver.assert_complete(leg, r)
    assert all(driver.first[leg, choice] == 0 for choice in range(n))
    assert min(row.start for step in driver.runner.steps for row in step) == num_prompt
    assert driver.runner.num_tokens_computed == n * (8 - 1)
    driver.assert_idle()


@pytest.mark.parametrize(("num_known", "num_cached"), [(20, 16), (100, 48), (48, 48), (47, 32)])
def test_its_own_prefix_hit_is_pinned_up_to_the_whole_prompt(
    num_known: int, num_cached: int
) -> None:
    driver = Driver()
    driver.know(num_known)
    r = request("d", prompt(48))
    leg = driver.reserved(r)
    assert driver.num_cached(leg) == num_cached
    driver.write_kv(leg, r, num_cached)
    driver.apply(driver.imported(leg, r))
    driver.run()
    driver.assert_complete(leg, r)
    assert driver.runner.num_tokens_computed == 7


def test_what_is_still_being_computed_is_no_hit() -> None:
    driver = Driver(max_num_batched_tokens=32)
    driver.local(request("l", prompt(90), max_tokens=2))
    driver.step()
    leg = driver.reserved(request("d", prompt(90)))
    assert driver.num_cached(leg) == 32


def test_hashes_are_published_when_it_joins_not_before() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = driver.reserved(r)
    driver.write_kv(leg, r)
    assert driver.stored == set()
    driver.apply(driver.imported(leg, r))
    driver.run()
    assert len(driver.stored) == 2
    known_leg = driver.local(request("l", prompt(60), max_tokens=1))
    driver.run()
    assert driver.num_cached(known_leg) == 32


def test_hashes_are_published_though_nothing_is_left_to_run() -> None:
    driver = Driver()
    driver.joined(request("d", prompt(40), max_tokens=1))
    driver.run()
    assert len(driver.stored) == 2
    driver.assert_idle()


def test_choices_share_full_blocks_and_copy_the_last() -> None:
    driver = Driver()
    r = request("d", prompt(40), n=3, temperature=1.0, seed=5)
    leg = driver.joined(r)
    driver.step()
    rows = driver.runner.steps[-1]
    first_blocks = {row.block_ids[:2] for row in rows}
    last_blocks = {row.block_ids[2] for row in rows}
    assert (len(first_blocks), len(last_blocks)) == (1, 3)
    assert len(driver.runner.copies[-1]) == 2, "the last owner of a block need not copy it"
    driver.run()
    driver.assert_complete(leg, r)


def test_no_room_is_said_at_once_and_holds_nothing() -> None:
    driver = Driver(6)
    held = driver.prefill(request("p", prompt(50)))
    driver.run()
    leg = driver.reserved(request("d", prompt(20, 1)))
    (event,) = driver.of(LegRefused, leg)
    assert event.free_blocks == 2
    driver.release(held)
    leg = driver.reserved(request("e", prompt(20, 1)))
    assert driver.of(KVReserved, leg)
    driver.abort(leg)
    driver.assert_idle()


# ── committed output and first tokens ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_committed", [(1, 0), (3, 5), (0, 7), (40, 20)])
def test_committed_output_is_recomputed_without_sampling(num_committed: tuple[int, int]) -> None:
    driver = Driver(max_num_batched_tokens=16)
    r = request("d", prompt(40), n=2, temperature=1.0, seed=5, max_tokens=50)
    committed = tuple(driver.expected(r, c)[: num_committed[c]] for c in range(2))
    resumed = replace(r, output_token_ids=committed)
    leg = driver.joined(resumed)
    driver.run()
    driver.assert_complete(leg, resumed)
    num_samples = sum(row.num_samples for step in driver.runner.steps for row in step)
    assert num_samples == sum(50 - max(num, 1) for num in num_committed)
    assert driver.of(LegPreempted) == []
    driver.assert_idle()


def test_committed_output_wins_over_a_first_token() -> None:
    driver = Driver()
    r = request("d", prompt(20))
    resumed = replace(r, output_token_ids=(driver.expected(r)[:2],))
    leg = driver.reserved(resumed)
    driver.write_kv(leg, resumed)
    driver.apply(KVImported(leg, (TokenChunk(leg, 0, 0, (123,)),)))
    driver.run()
    driver.assert_complete(leg, resumed)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 1}, FinishReason.LENGTH),
        ({"stop_token_ids": tuple(range(1000))}, FinishReason.STOP),
    ],
)
def test_a_first_token_that_ends_a_choice_ends_it(
    options: dict[str, object], reason: FinishReason
) -> None:
    driver = Driver()
    r = request("d", prompt(40), **options)
    leg = driver.joined(r)
    driver.run()
    assert driver.finished[leg, 0] is reason
    assert len(driver.tokens[leg, 0]) == 1
    assert driver.runner.steps == []
    driver.assert_idle()


def test_some_choices_end_with_their_first_token() -> None:
    driver = Driver(model=NullModel(eos_token_ids=(5,), eos_rate=0.5))
    for seed in range(20):
        r = request(f"d{seed}", prompt(20, seed), n=4, temperature=1.0, seed=seed)
        leg = driver.joined(r)
        driver.run()
        driver.assert_complete(leg, r)
    lengths = {len(tokens) for tokens in driver.tokens.values()}
    assert {1, 2} <= lengths
    driver.assert_idle()


def test_committed_output_that_is_complete_ends_without_a_token() -> None:
    driver = Driver()
    r = request("d", prompt(40), n=2, max_tokens=4)
    committed = (driver.expected(r, 0), driver.expected(r, 1)[:2])
    resumed = replace(r, output_token_ids=committed)
    leg = driver.joined(resumed)
    driver.run()
    driver.assert_complete(leg, resumed)
    assert driver.tokens[leg, 0] == []
    assert driver.first[leg, 0] == 4
    assert driver.finished[leg, 0] is FinishReason.LENGTH


@pytest.mark.parametrize("chunks", [(), ((0, 0, (1 << 31,)),), ((0, 1, (7,)),), ((0, 0, ()),)])
def test_a_missing_or_bad_first_token_fails_the_leg(
    chunks: tuple[tuple[int, int, tuple[int, ...]], ...],
) -> None:
    driver = Driver()
    leg = driver.reserved(request("d", prompt(40)))
    driver.apply(KVImported(leg, tuple(TokenChunk(leg, *chunk) for chunk in chunks)))
    driver.run()
    assert [event.cause for event in driver.of(LegFailed)] == [Cause.PROTOCOL]
    assert driver.stored == set()
    driver.apply(Quiesced(leg))
    driver.assert_idle()
