"""AddLocal: one prefill, one fork, n choices; how choices end, and what goes wrong."""

from dataclasses import replace

import pytest

from baton.engine.commands import AddLocal
from baton.engine.events import LegAdmitted, LegFailed, LegPreempted, LegTokens, PrefillProgress
from baton.engine.null_runner import NullModel
from baton.errors import Cause
from baton.types import FinishReason, LegId
from tests.engine.driver import Driver, leg_id, prompt, request


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize("num_prompt", [1, 16, 40])
def test_choices_share_one_prefill(n: int, num_prompt: int) -> None:
    driver = Driver(max_num_seqs=4)
    r = request("l", prompt(num_prompt), n=n, temperature=1.0, seed=3)
    leg = driver.local(r)
    driver.run()
    driver.assert_complete(leg, r)
    assert driver.runner.num_tokens_computed == num_prompt + n * 7
    assert len(driver.of(LegAdmitted, leg)) == 1
    assert len({tuple(tokens) for tokens in driver.tokens.values()}) == n, "seeds differ"
    driver.assert_idle()


def test_choices_of_a_greedy_request_are_equal() -> None:
    driver = Driver()
    r = request("l", prompt(20), n=3)
    leg = driver.local(r)
    driver.run()
    driver.assert_complete(leg, r)
    assert len({tuple(tokens) for tokens in driver.tokens.values()}) == 1


def test_more_choices_than_blocks_take_turns() -> None:
    driver = Driver(5, max_num_seqs=16)
    r = request("l", prompt(20), n=9, temperature=1.0, seed=3, max_tokens=40)
    leg = driver.local(r)
    driver.run()
    driver.assert_complete(leg, r)
    assert driver.of(LegPreempted, leg)
    driver.assert_idle()


def test_progress_ends_where_tokens_begin() -> None:
    driver = Driver(max_num_batched_tokens=32)
    driver.local(request("l", prompt(70), n=2))
    driver.run()
    kinds = [type(event) for event in driver.events]
    assert kinds[:5] == [LegAdmitted, PrefillProgress, PrefillProgress, PrefillProgress, LegTokens]
    assert set(kinds[5:]) == {LegTokens}
    assert driver.ready == [], "nobody fetches from a local leg"


@pytest.mark.parametrize("num_committed", [(0,), (3,), (2, 0), (1, 5), (0, 0, 4)])
def test_it_resumes_after_committed_output(num_committed: tuple[int, ...]) -> None:
    driver = Driver(max_num_batched_tokens=24)
    r = request("l", prompt(50), n=len(num_committed), temperature=1.0, seed=3)
    committed = tuple(driver.expected(r, c)[:num] for c, num in enumerate(num_committed))
    resumed = replace(r, output_token_ids=committed)
    leg = driver.local(resumed)
    driver.run()
    driver.assert_complete(leg, resumed)
    assert [driver.first[leg, c] for c in range(len(num_committed))] == list(num_committed)
    driver.assert_idle()


def test_cached_tokens_are_prompt_tokens() -> None:
    driver = Driver()
    r = request("a", prompt(20), max_tokens=40)
    driver.local(r)
    driver.run()
    resumed = replace(r, request_id="b", output_token_ids=(driver.expected(r)[:39],))
    leg = driver.local(resumed)
    driver.run()
    driver.assert_complete(leg, resumed)
    event = driver.last(LegAdmitted, leg)
    assert (event.num_cached_tokens, len(event.block_ids)) == (20, 2)
    assert driver.runner.num_tokens_computed == 20 + 39 + (59 - 48)


def test_finished_choices_stay_finished() -> None:
    driver = Driver()
    r = replace(request("l", prompt(50), n=3), finished_choices=frozenset({0, 2}))
    leg = driver.local(r)
    driver.run()
    driver.assert_complete(leg, r)
    assert set(driver.tokens) == {(leg, 1)}


def test_nothing_left_to_do_is_told_without_a_step() -> None:
    driver = Driver()
    r = request("l", prompt(50), n=2)
    done = tuple(driver.expected(r, c) for c in range(2))
    leg = driver.local(replace(r, output_token_ids=done))
    driver.run()
    assert set(driver.finished) == {(leg, 0), (leg, 1)}
    assert driver.runner.steps == []
    driver.assert_idle()


# ── how choices end ──────────────────────────────────────────────────────────────────────────────

EVERY = NullModel(vocab_size=20, eos_token_ids=(7,), eos_rate=0.3)


@pytest.mark.parametrize(
    ("options", "stop_ids", "first_stop"),
    [
        ({}, {7}, 0),
        ({"ignore_eos": True}, set(), 0),
        ({"min_tokens": 9}, {7}, 9),
        ({"stop_token_ids": (1, 2, 3, 4, 5)}, {1, 2, 3, 4, 5, 7}, 0),
    ],
)
def test_stop_ids_end_a_choice_and_are_its_last_token(
    options: dict[str, object], stop_ids: set[int], first_stop: int
) -> None:
    driver = Driver(model=EVERY)
    for seed in range(12):
        r = request(f"r{seed}", prompt(20), temperature=1.0, seed=seed, max_tokens=15, **options)
        leg = driver.local(r)
        driver.run()
        driver.assert_complete(leg, r)
    ends = [event.chunk for event in driver.of(LegTokens) if event.chunk.finish_reason]
    assert len(ends) == 12
    for chunk in ends:
        if chunk.finish_reason is FinishReason.STOP:
            assert chunk.stop_token_id == chunk.token_ids[-1]
            assert chunk.stop_token_id in stop_ids
            assert chunk.start >= first_stop
        else:
            assert chunk.stop_token_id is None
            assert chunk.start == 14
    assert (FinishReason.STOP in {chunk.finish_reason for chunk in ends}) == bool(stop_ids)


def test_the_model_length_ends_a_choice() -> None:
    driver = Driver(max_model_len=50)
    r = request("l", prompt(30), max_tokens=None)
    leg = driver.local(r)
    driver.run()
    driver.assert_complete(leg, r)
    assert len(driver.tokens[leg, 0]) == 20
    assert driver.finished[leg, 0] is FinishReason.LENGTH


# ── abort and failure ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("choice", [None, 0, 1])
def test_abort_is_legal_in_every_state(num_steps: int, choice: int | None) -> None:
    driver = Driver(max_num_batched_tokens=20)
    r = request("l", prompt(50), n=2, temperature=1.0, seed=1)
    leg = driver.local(r)
    for _ in range(num_steps):
        driver.step()
    seen = {key: len(tokens) for key, tokens in driver.tokens.items()}
    driver.abort(leg, choice)
    driver.run()
    for c in range(2):
        if choice in (None, c):
            assert len(driver.tokens[leg, c]) == seen.get((leg, c), 0), "nothing after the abort"
        else:
            assert tuple(driver.tokens[leg, c]) == driver.expected(r, c)
    driver.assert_idle()


def test_aborting_every_choice_ends_the_leg() -> None:
    driver = Driver()
    leg = driver.local(request("l", prompt(50), n=3))
    driver.step()
    for choice in (1, 1, 0, 7, 2):
        driver.abort(leg, choice)
    driver.assert_idle()
    assert not driver.finished


def test_a_step_that_raises_fails_its_legs_and_no_others() -> None:
    driver = Driver(max_num_seqs=2)
    requests = [request(name, prompt(20, i)) for i, name in enumerate("abc")]
    for r in requests:
        driver.local(r)
    driver.step()

    def fault(_: object) -> None:
        driver.runner.fault = None
        raise RuntimeError(f"could not compute {requests[0].prompt_token_ids}")

    driver.runner.fault = fault
    driver.run()
    assert [event.leg for event in driver.of(LegFailed)] == [leg_id("a"), leg_id("b")]
    for event in driver.of(LegFailed):
        assert event.cause is Cause.STEP_FAILED
        assert event.detail == "the engine step raised RuntimeError"
    driver.assert_complete(leg_id("c"), requests[2])
    driver.assert_idle()


def test_a_runner_that_does_not_answer_fails_the_step() -> None:
    driver = Driver()
    driver.local(request("a", prompt(20)))
    run = driver.runner.run
    driver.runner.run = lambda batch, _: dict.fromkeys(run(batch), ())  # type: ignore[method-assign]
    driver.run()
    assert [event.cause for event in driver.of(LegFailed)] == [Cause.STEP_FAILED]
    driver.assert_idle()


def test_numbers_that_are_not_finite_fail_their_leg_alone() -> None:
    driver = Driver()
    requests = [
        request(name, prompt(20, i), n=2, temperature=1.0, seed=i) for i, name in enumerate("ab")
    ]
    for r in requests:
        driver.local(r)
    driver.step()
    driver.step()
    driver.runner.non_finite = {driver.runner.steps[-1][0].row_id}
    driver.step()
    driver.runner.non_finite = set()
    driver.run()
    assert [(e.leg, e.cause) for e in driver.of(LegFailed)] == [
        (leg_id("a"), Cause.NON_FINITE_LOGITS)
    ]
    driver.assert_complete(leg_id("b"), requests[1])
    driver.assert_idle()


def test_kv_that_was_copied_is_the_same_for_whoever_comes_first() -> None:
    """A choice is aborted right after the fork: the block that its siblings copy stays whole."""
    for victim in range(3):
        driver = Driver(8)
        r = request("l", prompt(20), n=3, temperature=1.0, seed=4)
        leg = driver.local(r)
        driver.step()
        driver.apply(AddLocal(LegId("other", 0), request("other", prompt(40, 5))))
        driver.abort(leg, victim)
        driver.run()
        for choice in {0, 1, 2} - {victim}:
            assert tuple(driver.tokens[leg, choice]) == driver.expected(r, choice)
        driver.assert_idle()
