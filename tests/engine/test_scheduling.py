"""Who gets which tokens of a step, and who loses blocks."""

from dataclasses import replace

import pytest

from baton.engine.commands import Release
from baton.engine.config import EngineConfig
from baton.engine.events import LegAdmitted, LegFailed, LegPreempted, LegTokens
from baton.errors import Cause
from baton.types import LegId, Request
from tests.engine.driver import Driver, leg_id, prompt, request


def admitted(driver: Driver) -> list[LegId]:
    return [event.leg for event in driver.of(LegAdmitted)]


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    driver = Driver(max_num_batched_tokens=40)
    driver.local(request("a", prompt(100), max_tokens=1))
    driver.run()
    rows = [row for step in driver.runner.steps for row in step]
    assert [(row.start, row.num_tokens, row.num_samples) for row in rows] == [
        (0, 40, 0),
        (40, 40, 0),
        (80, 20, 1),
    ]


def test_decodes_come_first_and_leave_the_rest_of_the_budget() -> None:
    driver = Driver(max_num_batched_tokens=32)
    a = driver.local(request("a", prompt(16, 1), max_tokens=20))
    driver.step()
    driver.local(request("b", prompt(60, 2), max_tokens=1))
    driver.step()
    (decode, chunk) = driver.runner.steps[-1]
    assert (decode.start, decode.num_tokens) == (16, 1)
    assert (chunk.start, chunk.num_tokens) == (0, 31)
    driver.run()
    assert driver.of(LegPreempted) == []
    driver.assert_complete(a, request("a", prompt(16, 1), max_tokens=20))


def test_every_step_stays_in_budget_and_seats() -> None:
    driver = Driver(256, max_num_seqs=3, max_num_batched_tokens=20)
    requests = [request(f"r{i}", prompt(10 + 9 * i, i), n=1 + i % 4) for i in range(8)]
    legs = [driver.local(r) for r in requests]
    driver.run()
    for step in driver.runner.steps:
        assert len(step) <= 3
        assert sum(row.num_tokens for row in step) <= 20
    for leg, r in zip(legs, requests, strict=True):
        driver.assert_complete(leg, r)


def test_waiting_legs_start_by_priority_then_arrival() -> None:
    driver = Driver(max_num_seqs=1)
    for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", -1)]:
        driver.local(replace(request(name, prompt(20, ord(name))), priority=priority))
    driver.run()
    assert admitted(driver) == [leg_id(name) for name in "dacb"]


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "abcd"), ("deadline", "cbad")])
def test_deadlines_order_within_a_priority_if_told_to(policy: str, order: str) -> None:
    driver = Driver(max_num_seqs=1, scheduling_policy=policy)
    for name, deadline_ms in [("a", 5000), ("b", 900), ("c", 500), ("d", None)]:
        driver.local(replace(request(name, prompt(20, ord(name))), deadline_ms=deadline_ms))
        driver.now_s += 0.1
    driver.run()
    assert admitted(driver) == [leg_id(name) for name in order]


def test_a_higher_priority_overtakes_a_prefill_that_runs() -> None:
    driver = Driver(max_num_batched_tokens=48)
    driver.local(request("low", prompt(130, 1), max_tokens=1))
    driver.step()
    driver.local(replace(request("high", prompt(100, 2), max_tokens=1), priority=-1))
    driver.run()
    assert [[row.start for row in step] for step in driver.runner.steps] == [
        [0],
        [0],
        [48],
        [96, 48],
        [92],
    ]
    assert [event.chunk.leg.request_id for event in driver.of(LegTokens)] == ["high", "low"]


def test_who_does_not_fit_yet_waits_and_nobody_overtakes_it() -> None:
    driver = Driver(8)
    held = driver.prefill(request("held", prompt(80, 1)))
    driver.run()
    big, small = request("big", prompt(60, 2)), request("small", prompt(10, 3))
    driver.local(big)
    driver.local(small)
    driver.run()
    assert admitted(driver) == [held]
    assert not driver.core.has_work, "nothing to do before something is released"
    driver.release(held)
    driver.run()
    assert admitted(driver) == [held, leg_id("big"), leg_id("small")]
    driver.assert_idle()


def test_who_waits_starts_as_soon_as_it_fits() -> None:
    """It needs three blocks beside the four that it shares with a leg that is held."""
    driver = Driver(7)
    driver.prefill(request("same", prompt(64, 1)))
    other = driver.prefill(request("other", prompt(30, 2)))
    driver.run()
    leg = driver.local(request("l", prompt(100, 1), max_tokens=2))
    driver.run()
    assert leg not in admitted(driver)
    driver.core._intake.apply(Release(other))  # not even told that anything happened
    driver.step()
    assert leg in admitted(driver)


def test_who_waits_starts_when_a_transfer_brings_its_prefix() -> None:
    driver = Driver(10)
    held = driver.prefill(request("held", prompt(48, 2)))
    driver.run()
    waits = driver.local(request("waits", prompt(126, 1), max_tokens=2))
    driver.run()
    assert waits not in admitted(driver)
    r = request("d", prompt(64, 1), max_tokens=3)
    leg = driver.reserved(r)
    driver.write_kv(leg, r)
    driver.release(held)
    driver.step()
    assert waits not in admitted(driver), "five blocks of ten are free, and it needs eight"
    driver.apply(driver.imported(leg, r))
    driver.step()
    assert driver.num_cached(waits) == 64


def test_admission_leaves_a_block_for_everyone_who_decodes() -> None:
    driver = Driver(8)
    driver.local(request("a", prompt(16, 1), max_tokens=40))
    driver.step()
    driver.step()
    assert driver.core.pool.num_free == 6
    driver.local(request("b", prompt(96, 2), max_tokens=2))
    driver.step()
    assert admitted(driver) == [leg_id("a")]
    driver.local(request("c", prompt(80, 3), max_tokens=2))
    driver.run()
    assert driver.of(LegPreempted) == []


# ── preemption ───────────────────────────────────────────────────────────────────────────────────


def pressed(priorities: tuple[int, int] = (0, 0)) -> tuple[Driver, list[Request]]:
    """Two legs that fit together at first, and cannot both grow to their end."""
    driver = Driver(5)
    requests = [
        replace(request(name, prompt(30, i), max_tokens=30), priority=priorities[i])
        for i, name in enumerate("ab")
    ]
    for r in requests:
        driver.local(r)
    return driver, requests


def test_the_latest_is_preempted_and_recomputes_to_the_same_tokens() -> None:
    driver, requests = pressed()
    driver.run()
    assert {event.leg for event in driver.of(LegPreempted)} == {leg_id("b")}
    for r in requests:
        driver.assert_complete(leg_id(r.request_id), r)
    driver.assert_idle()


def test_the_lower_priority_is_preempted() -> None:
    driver, requests = pressed((1, 0))
    driver.run()
    assert {event.leg for event in driver.of(LegPreempted)} == {leg_id("a")}
    for r in requests:
        driver.assert_complete(leg_id(r.request_id), r)


def test_recomputing_samples_nothing_that_was_sampled() -> None:
    driver, _ = pressed()
    driver.run()
    num_samples = sum(row.num_samples for step in driver.runner.steps for row in step)
    assert num_samples == 60
    recomputed = [row for step in driver.runner.steps for row in step if row.start < 30]
    assert len(recomputed) > 2, "somebody started again"


def test_admission_after_a_preemption_happens_once() -> None:
    driver, _ = pressed()
    driver.run()
    assert len(driver.of(LegAdmitted)) == 2


def test_a_leg_with_a_ticket_is_not_preempted_while_it_is_computed() -> None:
    """The one that decodes gives way, though it came first."""
    driver = Driver(9, max_num_seqs=4, max_num_batched_tokens=4)
    r = request("first", prompt(14, 1), max_tokens=40)
    driver.local(r)
    driver.run_until_decoding()
    ticketed = driver.prefill(request("ticketed", prompt(100, 2)))
    driver.run()
    assert [event.leg for event in driver.of(LegPreempted)] == [leg_id("first")]
    assert driver.kv_of(ticketed) == driver.model.chain(None, prompt(100, 2))
    driver.release(ticketed)
    driver.run()
    driver.assert_complete(leg_id("first"), r)


def test_a_held_leg_is_never_preempted() -> None:
    driver = Driver(6)
    held = driver.prefill(request("held", prompt(48, 9)))
    driver.run()
    r = request("a", prompt(30, 1), max_tokens=18)
    driver.local(r)
    driver.local(request("b", prompt(14, 2), max_tokens=3))
    driver.run()
    assert held not in {event.leg for event in driver.of(LegPreempted)}
    driver.assert_complete(leg_id("a"), r)
    assert driver.kv_of(held) == driver.model.chain(None, prompt(48, 9))


def test_alone_a_leg_can_always_use_the_whole_pool() -> None:
    driver = Driver(4)
    r = request("a", prompt(20), max_tokens=45)
    driver.local(r)
    driver.run()
    driver.assert_complete(leg_id("a"), r)
    assert driver.of(LegPreempted) == []


# ── the door ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "num_prompt", "options", "cause"),
    [
        ("local", 20, {"max_tokens": 45}, None),
        ("local", 20, {"max_tokens": 46}, Cause.NEVER_FITS),
        ("local", 20, {"max_tokens": None}, Cause.NEVER_FITS),
        ("local", 64, {"max_tokens": 1}, None),
        ("local", 65, {"max_tokens": 1}, Cause.NEVER_FITS),
        ("local", 20, {"max_tokens": 8, "n": 50}, None),
        ("prefill", 64, {"max_tokens": 400}, None),
        ("prefill", 65, {"max_tokens": 1}, Cause.NEVER_FITS),
        ("decode", 40, {"max_tokens": 4}, None),
        ("decode", 40, {"max_tokens": 4, "n": 2}, Cause.NEVER_FITS),
        ("local", 100, {}, Cause.CONTEXT_LENGTH_EXCEEDED),
        ("prefill", 0, {}, Cause.INVALID_REQUEST),
        ("local", 20, {"temperature": 1.0}, Cause.INVALID_REQUEST),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(
    kind: str, num_prompt: int, options: dict[str, object], cause: Cause | None
) -> None:
    driver = Driver(4, max_model_len=100)
    leg = getattr(driver, kind)(request("a", prompt(num_prompt), **options))
    driver.step()
    failures = [event.cause for event in driver.of(LegFailed, leg)]
    assert failures == ([] if cause is None else [cause])
    if cause is not None:
        driver.assert_idle()


def test_ids_outside_the_vocabulary_are_refused() -> None:
    driver = Driver(vocab_size=100)
    for index, ids in enumerate([(1, 2, 100), (-1, 5)]):
        driver.local(request(f"r{index}", ids))
    committed = replace(request("c", (1, 2)), output_token_ids=((7, 100),))
    driver.local(committed)
    driver.run()
    assert [e.cause for e in driver.of(LegFailed)] == [Cause.INVALID_REQUEST] * 3
    assert driver.runner.steps == []


@pytest.mark.parametrize("kind", ["local", "prefill", "decode"])
def test_a_request_without_an_open_choice_is_refused(kind: str) -> None:
    driver = Driver()
    r = replace(request("a", prompt(20), n=2), finished_choices=frozenset({0, 1}))
    leg = getattr(driver, kind)(r)
    driver.run()
    assert [event.cause for event in driver.of(LegFailed, leg)] == [Cause.INVALID_REQUEST]


def test_the_line_is_bounded() -> None:
    driver = Driver(max_num_waiting=2)
    for index in range(3):
        driver.local(request(f"r{index}", prompt(20, index)))
    driver.run()
    (refused,) = driver.of(LegFailed)
    assert (refused.leg, refused.cause) == (leg_id("r2"), Cause.OVERLOADED)


def test_a_second_leg_with_the_same_id_ends_both() -> None:
    driver = Driver()
    leg = driver.local(request("a", prompt(20)))
    driver.step()
    driver.local(request("a", prompt(20)))
    driver.run()
    assert [event.cause for event in driver.of(LegFailed, leg)] == [Cause.PROTOCOL]
    driver.assert_idle()


@pytest.mark.parametrize(
    "options",
    [{"num_blocks": 0}, {"block_size": 24}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 0}],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EngineConfig(**{"num_blocks": 4, "max_num_seqs": 8, **options})  # type: ignore[arg-type]
