"""What is computed once, and who computes it."""

from dataclasses import replace

import pytest

from baton.engine.commands import Quiesced
from baton.engine.events import LegFailed, LegPreempted, PrefillProgress
from baton.hashing import prefix_hashes, root_hash
from baton.types import LegId
from tests.engine.driver import Driver, leg_id, prompt, request

ONE = {"max_tokens": 1}


def run_legs(driver: Driver, *lengths: int, seed: int = 0) -> list[LegId]:
    """One local leg per prompt length, all with the same beginning, one after the other."""
    legs = []
    for length in lengths:
        r = request(f"r{len(driver.outputs)}-{length}", prompt(length, seed), **ONE)
        legs.append(driver.local(r))
        driver.run()
        driver.assert_complete(legs[-1], r)
    return legs


@pytest.mark.parametrize(
    ("first", "second", "num_cached"),
    [
        (100, 100, 96),
        (100, 40, 32),
        (40, 100, 32),
        (96, 96, 80),  # at least the last prompt token is computed, so its block is
        (96, 97, 96),
        (15, 100, 0),
    ],
)
def test_full_blocks_of_a_known_prefix_are_not_computed_again(
    first: int, second: int, num_cached: int
) -> None:
    driver = Driver()
    _, leg = run_legs(driver, first, second)
    assert driver.num_cached(leg) == num_cached
    assert driver.runner.num_tokens_computed == first + second - num_cached


def test_a_block_of_32_is_shared_as_a_whole() -> None:
    driver = Driver(block_size=32)
    _, leg = run_legs(driver, 100, 60)
    assert driver.num_cached(leg) == 32
    assert driver.stored == set(prefix_hashes(root_hash(b"", b""), prompt(96)))


def test_nothing_is_shared_when_it_is_off() -> None:
    driver = Driver(enable_prefix_caching=False)
    _, leg = run_legs(driver, 100, 100)
    assert driver.num_cached(leg) == 0
    assert driver.runner.num_tokens_computed == 200
    assert driver.stored == set()


def test_tenants_do_not_share() -> None:
    driver = Driver()
    for salt in (b"one", b"two"):
        driver.local(replace(request(salt.decode(), prompt(100), **ONE), salt=salt))
        driver.run()
    assert driver.runner.num_tokens_computed == 200


def test_the_output_of_a_turn_is_part_of_the_next_prompt() -> None:
    driver = Driver()
    r = request("turn1", prompt(30), max_tokens=40)
    driver.local(r)
    driver.run()
    conversation = (*r.prompt_token_ids, *driver.tokens[leg_id("turn1"), 0], *prompt(10, 5))
    driver.local(request("turn2", conversation, **ONE))
    driver.run()
    # The last output token was never run, so the last block that is full has 64 tokens.
    assert driver.num_cached(leg_id("turn2")) == 64


def test_the_root_and_chain_are_those_of_the_definition() -> None:
    driver = Driver(fingerprint=b"model")
    driver.local(replace(request("a", prompt(64), **ONE), salt=b"tenant"))
    driver.run()
    (stored,) = [output.stored for output in driver.outputs if output.stored]
    assert list(stored) == prefix_hashes(root_hash(b"model", b"tenant"), prompt(64))


def test_eviction_is_told() -> None:
    driver = Driver(4)
    run_legs(driver, 64, seed=1)
    assert len(driver.stored) == 4
    run_legs(driver, 33, seed=2)
    hashes = prefix_hashes(root_hash(b"", b""), prompt(64, 1))
    assert driver.stored & set(hashes) == {hashes[0]}, "the end of a prefix goes first"


# ── while it is being computed ───────────────────────────────────────────────────────────────────


def test_a_second_request_waits_for_blocks_that_are_being_computed() -> None:
    driver = Driver(max_num_batched_tokens=64)
    requests = [request(name, prompt(200), **ONE) for name in "abc"]
    for r in requests:
        driver.local(r)
    driver.run()
    for r in requests:
        driver.assert_complete(leg_id(r.request_id), r)
    # 192 tokens are in full blocks; the rest, 8 tokens, is each one's own.
    assert driver.runner.num_tokens_computed == 200 + 8 + 8


def test_who_waits_does_not_hold_up_others() -> None:
    driver = Driver(max_num_batched_tokens=100)
    driver.local(request("a", prompt(90), max_tokens=1))
    driver.local(request("b", prompt(95), max_tokens=1))
    other = driver.local(request("c", prompt(10, 1), max_tokens=1))
    driver.step()
    assert (other, 0) in driver.finished
    assert [row.num_tokens for row in driver.runner.steps[0]] == [90, 10]
    driver.run()
    assert driver.runner.num_tokens_computed == 90 + 10 + 15


def test_a_waiting_prefill_tells_what_others_have_computed_for_it() -> None:
    driver = Driver(max_num_batched_tokens=70)
    driver.local(request("a", prompt(100), **ONE))
    driver.step()
    b = driver.prefill(request("b", prompt(120)))
    driver.run()
    assert driver.num_cached(b) == 64
    assert [event.tokens_done for event in driver.of(PrefillProgress, b)] == [96, 120]
    computed = [(r.token_start, r.token_stop) for leg, r in driver.ready if leg == b]
    assert computed == [(96, 120)], "only what a step of its own computes"
    assert driver.kv_of(b) == driver.model.chain(None, prompt(120))


@pytest.mark.parametrize("in_flight", [False, True])
def test_the_next_one_computes_when_the_first_is_aborted(in_flight: bool) -> None:
    driver = Driver(max_num_batched_tokens=48)
    a = driver.prefill(request("a", prompt(200)))
    requests = [request(name, prompt(200), **ONE) for name in "bc"]
    driver.step()
    for r in requests:
        driver.local(r)
    driver.step()
    driver.abort(a, in_flight=in_flight)
    driver.run()
    for r in requests:
        driver.assert_complete(leg_id(r.request_id), r)
    assert driver.runner.num_tokens_computed == 200 + 8, "nobody starts from the beginning"
    driver.apply(Quiesced(a))
    driver.assert_idle()


def test_waiters_admitted_before_the_abort_take_over_in_the_middle() -> None:
    """All three are admitted in one step: b and c share a's blocks while a is at its first."""
    driver = Driver(max_num_batched_tokens=24, max_num_seqs=4)
    a = driver.local(replace(request("a", prompt(70), **ONE), priority=1))
    driver.step()
    requests = [request(name, prompt(70), **ONE) for name in "bc"]
    for r in requests:
        driver.local(r)
    driver.step()
    assert [row.start for row in driver.runner.steps[-1]] == [24], "a runs with b's priority"
    driver.abort(a)
    driver.run()
    for r in requests:
        driver.assert_complete(leg_id(r.request_id), r)
    assert driver.runner.num_tokens_computed == 48 + 22 + 6


def test_the_next_one_computes_when_the_first_fails() -> None:
    driver = Driver(max_num_batched_tokens=24)
    driver.local(replace(request("a", prompt(70), **ONE), priority=1))
    driver.step()
    r = request("b", prompt(70), **ONE)
    driver.local(r)

    def fault(_: object) -> None:
        driver.runner.fault = None
        raise RuntimeError("boom")

    driver.runner.fault = fault
    driver.run()
    driver.assert_complete(leg_id("b"), r)
    driver.assert_idle()


def test_the_next_one_computes_when_the_first_is_preempted() -> None:
    driver = Driver(11, max_num_seqs=4, max_num_batched_tokens=4)
    grows = replace(request("grows", prompt(30, 1), max_tokens=30), priority=-1)
    first = replace(request("first", prompt(110, 2), **ONE), priority=1)
    second = request("second", prompt(110, 2), **ONE)
    driver.local(grows)
    while not driver.tokens:
        driver.step()
    driver.local(first)
    driver.step()
    driver.local(second)
    driver.run()
    for r in (grows, first, second):
        driver.assert_complete(leg_id(r.request_id), r)
    assert [event.leg for event in driver.of(LegPreempted)] == [leg_id("first")]
    # Each has 14 tokens of its own; of the 96 that they share only a part of one block is lost.
    num_shared = driver.runner.num_tokens_computed - 30 - 29 - 14 - 14
    assert 96 <= num_shared < 96 + 16


def test_a_chunk_ends_where_somebody_else_computes() -> None:
    """Of four blocks that a leaves behind, b comes first and c has claimed the third."""
    driver = Driver(max_num_batched_tokens=100)
    requests = [request(name, prompt(70), **ONE) for name in "abc"]
    for r in requests:
        driver.local(r)
    driver.runner.non_finite = {0}
    driver.step()
    assert [event.leg for event in driver.of(LegFailed)] == [leg_id("a")]
    _, c = driver.core._scheduler.running
    assert driver.core.pool.cache.claim(c.block_ids[2], c)
    driver.run()
    rows = [[(row.start, row.num_tokens) for row in step] for step in driver.runner.steps]
    assert rows == [[(0, 70)], [(0, 32)], [(32, 38)], [(64, 6)]]
    for r in requests[1:]:
        driver.assert_complete(leg_id(r.request_id), r)


def test_kv_of_a_leg_with_bad_numbers_is_not_reused() -> None:
    driver = Driver(max_num_batched_tokens=128)
    a = driver.local(request("a", prompt(100), max_tokens=9))
    driver.step()
    assert len(driver.stored) == 6
    driver.runner.non_finite = {driver.runner.steps[0][0].row_id}
    driver.step()
    driver.runner.non_finite = set()
    assert driver.stored == set()
    run_legs(driver, 100)
    assert driver.runner.num_tokens_computed == 100 + 1 + 100
    assert not driver.finished.get((a, 0))
    driver.assert_idle()
