"""AddDecode: reserve at once, wait for the KV, join, decode; recompute nothing that came."""

from dataclasses import replace

import pytest

from baton.engine.commands import ComputeHere, KVFailed, KVImported, Quiesced
from baton.engine.events import (
    KVReserved,
    LegAdmitted,
    LegFailed,
    LegPreempted,
    LegRefused,
    PrefillProgress,
)
from baton.engine.null_runner import NullModel
from baton.errors import Cause
from baton.types import FinishReason, LegId, Request, TokenChunk
from tests.engine.driver import Driver, leg_id, prompt, request


def reserved(driver: Driver, r: Request) -> LegId:
    leg = driver.decode(r)
    driver.step()
    return leg


def joined(driver: Driver, r: Request) -> LegId:
    leg = reserved(driver, r)
    driver.write_kv(leg, r)
    driver.apply(driver.imported(leg, r))
    return leg


def known(driver: Driver, num_tokens: int, seed: int = 0) -> None:
    """Put a prompt into the prefix cache; resets the counters."""
    driver.local(request(f"known{num_tokens}", prompt(num_tokens, seed), max_tokens=1))
    driver.run()
    driver.runner.num_tokens_computed = 0


def test_it_reserves_at_once_and_waits() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = reserved(driver, r)
    event = driver.last(KVReserved, leg)
    assert (len(event.block_ids), event.num_prompt_tokens, event.num_cached_tokens) == (3, 40, 0)
    snapshot = driver.core.snapshot()
    assert (snapshot.num_waiting_for_kv, snapshot.num_running) == (1, 0)
    assert snapshot.free_blocks == 64 - 3 - 1, "the prompt and one growth block"
    assert not driver.core.has_work


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("num_prompt", [5, 16, 40, 48])
def test_it_decodes_from_index_0_and_computes_no_prompt_token(n: int, num_prompt: int) -> None:
    driver = Driver(max_num_seqs=3)
    r = request("d", prompt(num_prompt), n=n, temperature=1.0, seed=5)
    leg = joined(driver, r)
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
    known(driver, num_known)
    r = request("d", prompt(48))
    leg = reserved(driver, r)
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
    leg = reserved(driver, request("d", prompt(90)))
    assert driver.num_cached(leg) == 32


def test_hashes_are_published_when_it_joins_not_before() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = reserved(driver, r)
    driver.write_kv(leg, r)
    assert driver.stored == set()
    driver.apply(driver.imported(leg, r))
    driver.run()
    assert len(driver.stored) == 2
    known_leg = driver.local(request("l", prompt(60), max_tokens=1))
    driver.run()
    assert driver.num_cached(known_leg) == 32


def test_choices_share_full_blocks_and_copy_the_last() -> None:
    driver = Driver()
    r = request("d", prompt(40), n=3, temperature=1.0, seed=5)
    leg = joined(driver, r)
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
    leg = reserved(driver, request("d", prompt(20, 1)))
    (event,) = driver.of(LegRefused, leg)
    assert event.free_blocks == 2
    driver.release(held)
    leg = reserved(driver, request("e", prompt(20, 1)))
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
    leg = joined(driver, resumed)
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
    leg = reserved(driver, resumed)
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
    leg = joined(driver, r)
    driver.run()
    assert driver.finished[leg, 0] is reason
    assert len(driver.tokens[leg, 0]) == 1
    assert driver.runner.steps == []
    driver.assert_idle()


def test_some_choices_end_with_their_first_token() -> None:
    driver = Driver(model=NullModel(eos_token_ids=(5,), eos_rate=0.5))
    for seed in range(20):
        r = request(f"d{seed}", prompt(20, seed), n=4, temperature=1.0, seed=seed)
        leg = joined(driver, r)
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
    leg = joined(driver, resumed)
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
    leg = reserved(driver, request("d", prompt(40)))
    driver.apply(KVImported(leg, tuple(TokenChunk(leg, *chunk) for chunk in chunks)))
    driver.run()
    assert [event.cause for event in driver.of(LegFailed)] == [Cause.PROTOCOL]
    assert driver.stored == set()
    driver.apply(Quiesced(leg))
    driver.assert_idle()


# ── when the KV does not come ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("num_known", "num_valid"), [(0, 0), (0, 29), (33, 32), (33, 40), (48, 48)]
)
def test_compute_here_keeps_the_verified_prefix(n: int, num_known: int, num_valid: int) -> None:
    driver = Driver()
    if num_known:
        known(driver, num_known)
    r = request("d", prompt(48), n=n, temperature=1.0, seed=2)
    leg = reserved(driver, r)
    driver.write_kv(leg, r, driver.num_cached(leg), num_valid)
    free = driver.core.snapshot().free_blocks
    driver.apply(KVFailed(leg, num_valid))
    driver.run()
    assert driver.core.snapshot().free_blocks == free, "it keeps everything and waits"
    driver.apply(ComputeHere(leg))
    driver.run()
    driver.assert_complete(leg, r)
    num_prompt_computed = 48 - min(num_valid, 47)
    assert driver.runner.num_tokens_computed == num_prompt_computed + n * 7
    assert driver.last(PrefillProgress, leg).tokens_done == 48
    assert driver.of(LegAdmitted, leg) == []
    driver.assert_idle()


def test_compute_here_without_any_transfer_uses_the_own_prefix() -> None:
    driver = Driver()
    known(driver, 40)
    r = request("d", prompt(48))
    leg = reserved(driver, r)
    driver.apply(ComputeHere(leg))
    driver.run()
    driver.assert_complete(leg, r)
    assert driver.runner.num_tokens_computed == 16 + 7


def test_the_last_prompt_token_is_run_in_a_copy_of_a_shared_block() -> None:
    """Its block belongs to the prefix cache: whoever reads it must not see it change."""
    driver = Driver()
    known(driver, 49)
    r = request("d", prompt(48))
    leg = reserved(driver, r)
    shared = driver.last(KVReserved, leg).block_ids[2]
    driver.apply(ComputeHere(leg))
    driver.run()
    driver.assert_complete(leg, r)
    (copies,) = [copies for copies in driver.runner.copies if copies]
    assert [source for source, _ in copies] == [shared]
    assert all(shared not in row.block_ids for step in driver.runner.steps[1:] for row in step)


@pytest.mark.parametrize("n", [1, 2])
def test_compute_here_with_committed_output(n: int) -> None:
    driver = Driver()
    r = request("d", prompt(40), n=n, temperature=1.0, seed=2)
    committed = tuple(driver.expected(r, c)[: 3 - c] for c in range(n))
    resumed = replace(r, output_token_ids=committed)
    leg = reserved(driver, resumed)
    driver.write_kv(leg, r, 0, 20)
    driver.apply(KVFailed(leg, 20), ComputeHere(leg))
    driver.run()
    driver.assert_complete(leg, resumed)
    driver.assert_idle()


def test_compute_here_with_nothing_left_to_do_ends() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = reserved(driver, replace(r, output_token_ids=(driver.expected(r),)))
    driver.apply(ComputeHere(leg))
    driver.run()
    assert driver.finished[leg, 0] is FinishReason.LENGTH
    driver.assert_idle()


def test_a_second_attempt_to_fetch_joins_too() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = reserved(driver, r)
    driver.write_kv(leg, r, 0, 20)
    driver.apply(KVFailed(leg, 20))
    driver.run()
    driver.write_kv(leg, r, 20)
    driver.apply(driver.imported(leg, r))
    driver.run()
    driver.assert_complete(leg, r)


def test_blocks_with_a_writer_in_flight_are_not_reused() -> None:
    """Switching the quarantine off lets the slow writer overwrite the second leg's KV."""
    driver = Driver(8)
    slow = request("slow", prompt(100, 1))
    leg = reserved(driver, slow)
    driver.abort(leg, in_flight=True)
    assert driver.core.snapshot().num_quarantined_blocks == 8
    r = request("next", prompt(60, 2))
    driver.local(r)
    driver.step()
    driver.write_kv(leg, slow)
    assert not driver.of(LegAdmitted)
    driver.apply(Quiesced(leg))
    driver.run()
    driver.assert_complete(leg_id("next"), r)
    driver.assert_idle()


@pytest.mark.parametrize("state", ["reserved", "failed", "joined", "running"])
@pytest.mark.parametrize("choice", [None, 1])
def test_abort_is_legal_in_every_state(state: str, choice: int | None) -> None:
    driver = Driver()
    r = request("d", prompt(40), n=2, temperature=1.0, seed=2)
    leg = reserved(driver, r) if state in ("reserved", "failed") else joined(driver, r)
    if state == "failed":
        driver.apply(KVFailed(leg, 10))
    if state == "running":
        driver.step()
    driver.abort(leg, choice)
    if choice is not None and state in ("reserved", "failed"):
        driver.write_kv(leg, r)
        driver.apply(driver.imported(leg, r))
    driver.run()
    assert ((leg, 0) in driver.finished) == (choice is not None)
    assert (leg, 1) not in driver.finished
    driver.assert_idle()


def test_late_commands_for_a_leg_that_is_gone_change_nothing() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = reserved(driver, r)
    driver.abort(leg)
    driver.apply(driver.imported(leg, r), KVFailed(leg, 3), ComputeHere(leg), Quiesced(leg))
    driver.run()
    assert driver.tokens == {}
    driver.assert_idle()


def test_ready_legs_wait_for_a_seat_with_their_blocks_and_may_lose_them() -> None:
    driver = Driver(10, max_num_seqs=1)
    requests = [request(name, prompt(30, i), max_tokens=60) for i, name in enumerate("abc")]
    legs = [joined(driver, r) for r in requests]
    snapshot = driver.core.snapshot()
    assert snapshot.num_waiting + snapshot.num_running == 3
    driver.run()
    for leg, r in zip(legs, requests, strict=True):
        driver.assert_complete(leg, r)
    assert {event.leg for event in driver.of(LegPreempted)} == {legs[2]}, "the last"
    driver.assert_idle()
