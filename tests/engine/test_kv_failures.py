"""AddDecode when the KV does not come, comes late, or the leg is ended first."""

from dataclasses import replace

import pytest

from baton.engine.commands import ComputeHere, KVFailed, Quiesced
from baton.engine.events import (
    KVReserved,
    LegAdmitted,
    LegPreempted,
    PrefillProgress,
)
from baton.types import FinishReason
from tests.engine.driver import Driver, leg_id, prompt, request


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("num_known", "num_valid"), [(0, 0), (0, 29), (33, 32), (33, 40), (48, 48)]
)
def test_compute_here_keeps_the_verified_prefix(n: int, num_known: int, num_valid: int) -> None:
    driver = Driver()
    if num_known:
        driver.know(num_known)
    r = request("d", prompt(48), n=n, temperature=1.0, seed=2)
    leg = driver.reserved(r)
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


@pytest.mark.parametrize(("told", "num_computed"), [(0, 16 + 7), (999, 1 + 7)])
def test_a_number_of_valid_tokens_that_cannot_be_is_not_believed(
    told: int, num_computed: int
) -> None:
    """It has 32 of its own, and 48 in all."""
    driver = Driver()
    driver.know(33)
    r = request("d", prompt(48))
    leg = driver.reserved(r)
    driver.write_kv(leg, r, 32)
    driver.apply(KVFailed(leg, told), ComputeHere(leg))
    driver.run()
    driver.assert_complete(leg, r)
    assert driver.runner.num_tokens_computed == num_computed


def test_who_computes_here_is_waited_for_like_any_other() -> None:
    driver = Driver(max_num_batched_tokens=32)
    d, r = request("d", prompt(80), max_tokens=1), request("l", prompt(90), max_tokens=1)
    leg = driver.reserved(d)
    driver.apply(ComputeHere(leg))
    driver.local(r)
    driver.run()
    driver.assert_complete(leg, d)
    driver.assert_complete(leg_id("l"), r)
    assert driver.runner.num_tokens_computed == 80 + 10


def test_compute_here_without_any_transfer_uses_the_own_prefix() -> None:
    driver = Driver()
    driver.know(40)
    r = request("d", prompt(48))
    leg = driver.reserved(r)
    driver.apply(ComputeHere(leg))
    driver.run()
    driver.assert_complete(leg, r)
    assert driver.runner.num_tokens_computed == 16 + 7


def test_the_last_prompt_token_is_run_in_a_copy_of_a_shared_block() -> None:
    """Its block belongs to the prefix cache: whoever reads it must not see it change."""
    driver = Driver()
    driver.know(49)
    r = request("d", prompt(48))
    leg = driver.reserved(r)
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
    leg = driver.reserved(resumed)
    driver.write_kv(leg, r, 0, 20)
    driver.apply(KVFailed(leg, 20), ComputeHere(leg))
    driver.run()
    driver.assert_complete(leg, resumed)
    driver.assert_idle()


def test_compute_here_with_nothing_left_to_do_ends() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = driver.reserved(replace(r, output_token_ids=(driver.expected(r),)))
    driver.apply(ComputeHere(leg))
    driver.run()
    assert driver.finished[leg, 0] is FinishReason.LENGTH
    driver.assert_idle()


def test_a_second_attempt_to_fetch_joins_too() -> None:
    driver = Driver()
    r = request("d", prompt(40))
    leg = driver.reserved(r)
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
    leg = driver.reserved(slow)
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
    leg = driver.reserved(r) if state in ("reserved", "failed") else driver.joined(r)
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
    leg = driver.reserved(r)
    driver.abort(leg)
    driver.apply(driver.imported(leg, r), KVFailed(leg, 3), ComputeHere(leg), Quiesced(leg))
    driver.run()
    assert driver.tokens == {}
    driver.assert_idle()


def test_ready_legs_wait_for_a_seat_with_their_blocks_and_may_lose_them() -> None:
    driver = Driver(10, max_num_seqs=1)
    requests = [request(name, prompt(30, i), max_tokens=60) for i, name in enumerate("abc")]
    legs = [driver.joined(r) for r in requests]
    snapshot = driver.core.snapshot()
    assert snapshot.num_waiting + snapshot.num_running == 3
    driver.run()
    for leg, r in zip(legs, requests, strict=True):
        driver.assert_complete(leg, r)
    assert {event.leg for event in driver.of(LegPreempted)} == {legs[2]}, "the last"
    driver.assert_idle()
