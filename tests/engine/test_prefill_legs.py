"""AddPrefill: all blocks at once, computed in chunks, first tokens, then held until released."""

from dataclasses import replace
from typing import NoReturn

import pytest

from baton.engine.batch import Batch, OnLayers
from baton.engine.commands import Pin, Quiesced, Retain
from baton.engine.events import (
    KVReserved,
    LeaseEvicted,
    LegAdmitted,
    LegFailed,
    LegPinned,
    LegTokens,
    PrefillProgress,
)
from baton.engine.null_runner import NullModel
from baton.errors import Cause
from baton.types import FinishReason, KVRange, LegId
from tests.engine.driver import Driver, leg_id, prompt, request


def held(driver: Driver, name: str = "p", num_tokens: int = 40, seed: int = 0) -> LegId:
    leg = driver.prefill(request(name, prompt(num_tokens, seed)))
    driver.run()
    return leg


def test_it_is_admitted_computed_and_sampled_once() -> None:
    driver = Driver(max_num_batched_tokens=40, num_layers=3)
    r = request("p", prompt(100), n=2, temperature=1.0, seed=11)
    leg = driver.prefill(r)
    events = driver.run()
    assert [type(event) for event in events] == [
        LegAdmitted,
        PrefillProgress,
        PrefillProgress,
        PrefillProgress,
        LegTokens,
        LegTokens,
    ]
    assert [e.tokens_done for e in driver.of(PrefillProgress)] == [40, 80, 100]
    assert driver.ready == [
        (leg, KVRange(0, num_layers, start, stop))
        for start, stop in [(0, 40), (40, 80), (80, 100)]
        for num_layers in (1, 2)  # of 3: the last one comes with the progress
    ]
    for choice in range(2):
        assert tuple(driver.tokens[leg, choice]) == driver.expected(r, choice)[:1]
    assert driver.finished == {}
    assert len(driver.last(LegAdmitted, leg).block_ids) == 7
    assert driver.kv_of(leg) == driver.model.chain(None, r.prompt_token_ids)
    assert driver.core.snapshot().num_leases == 1
    assert driver.core.snapshot().free_blocks == 64 - 7
    driver.release(leg)
    driver.assert_idle()


def test_what_scheduling_knows_is_told_before_the_step_is_computed() -> None:
    driver = Driver()
    leg = driver.prefill(request("p", prompt(20)))
    reserved = driver.decode(request("d", prompt(20, 1)))
    early = driver.core.begin()
    assert early is not None
    assert {type(event) for event in early.events} == {LegAdmitted, KVReserved}
    assert early.timing is None
    assert driver.runner.steps == []
    late = driver.core.compute()
    assert late is not None
    assert late.timing is not None
    assert [type(event) for event in late.events] == [PrefillProgress, LegTokens]
    driver.release(leg)
    driver.abort(reserved)
    assert driver.core.begin() is None, "nobody waits for this"
    assert driver.core.compute() is not None, "but the snapshot has changed"


def test_a_step_that_fails_midway_has_told_no_whole_token() -> None:
    """Layers were ready; their tokens are not, and the leg's blocks wait for its readers."""
    driver = Driver(num_layers=3)
    leg = driver.prefill(request("p", prompt(20)))
    run = driver.runner.run

    def break_down(batch: Batch, on_layers: OnLayers | None) -> NoReturn:
        run(batch, on_layers)
        raise RuntimeError("after all layers")

    driver.runner.run = break_down  # type: ignore[method-assign]
    driver.run()
    assert driver.ready[-1] == (leg, KVRange(0, 2, 0, 20))
    assert driver.of(PrefillProgress) == []
    assert driver.last(LegFailed, leg).cause is Cause.STEP_FAILED
    assert driver.core.snapshot().num_quarantined_blocks == 2
    driver.apply(Quiesced(leg))
    driver.assert_idle()


def test_all_blocks_are_reserved_at_admission() -> None:
    driver = Driver(max_num_batched_tokens=16)
    driver.prefill(request("p", prompt(100)))
    driver.step()
    assert driver.core.snapshot().free_blocks == 64 - 7
    assert driver.core.snapshot().queued_prefill_tokens == 84


def test_first_tokens_that_end_a_choice_say_so() -> None:
    driver = Driver()
    r = request("p", prompt(40), n=2, max_tokens=1)
    leg = driver.prefill(r)
    driver.run()
    assert driver.finished == {(leg, 0): FinishReason.LENGTH, (leg, 1): FinishReason.LENGTH}
    assert driver.core.snapshot().num_leases == 1, "held until it is released all the same"


def test_eos_as_first_token() -> None:
    driver = Driver(model=NullModel(eos_token_ids=(5,), eos_rate=1.0))
    leg = driver.prefill(request("p", prompt(40)))
    driver.run()
    (event,) = driver.of(LegTokens)
    assert (event.chunk.token_ids, event.chunk.stop_token_id) == ((5,), 5)
    assert driver.finished[leg, 0] is FinishReason.STOP


def test_committed_output_changes_nothing_here() -> None:
    driver = Driver()
    r = request("p", prompt(40), temperature=1.0, seed=3)
    resumed = replace(r, output_token_ids=(driver.expected(r)[:4],))
    leg = driver.prefill(resumed)
    driver.run()
    assert tuple(driver.tokens[leg, 0]) == driver.expected(r)[:1]
    assert driver.first[leg, 0] == 0
    assert driver.runner.num_tokens_computed == 40


def test_finished_choices_are_not_sampled() -> None:
    driver = Driver()
    leg = driver.prefill(replace(request("p", prompt(40), n=3), finished_choices=frozenset({1})))
    driver.run()
    assert set(driver.tokens) == {(leg, 0), (leg, 2)}


# ── retained legs ────────────────────────────────────────────────────────────────────────────────


def test_a_retained_leg_can_be_pinned_again() -> None:
    driver = Driver(8)
    leg = held(driver)
    driver.apply(Retain(leg))
    assert driver.core.snapshot().free_blocks == 8
    assert driver.core.snapshot().num_leases == 1
    other = driver.local(request("other", prompt(70, 1), max_tokens=2))
    driver.run()
    assert (other, 0) in driver.finished
    driver.apply(Pin(leg))
    driver.run()
    assert driver.of(LegPinned, leg)
    assert driver.core.snapshot().free_blocks == 5
    assert driver.kv_of(leg) == driver.model.chain(None, prompt(40))
    driver.release(leg)
    driver.assert_idle()


def test_retained_legs_are_evicted_oldest_first_and_told() -> None:
    driver = Driver(9)
    legs = [held(driver, name, 40, seed) for seed, name in enumerate("abc")]
    for leg in (legs[1], legs[0]):
        driver.apply(Retain(leg))
    driver.local(request("other", prompt(20, 9), max_tokens=2))
    driver.run()
    assert [event.leg for event in driver.of(LeaseEvicted)] == [legs[1]]
    driver.apply(Pin(legs[0]), Pin(legs[1]))
    driver.run()
    assert [event.leg for event in driver.of(LegPinned)] == [legs[0]]
    assert [event.leg for event in driver.of(LeaseEvicted)] == [legs[1], legs[1]]
    assert driver.kv_of(legs[0]) == driver.model.chain(None, prompt(40, 0))
    for leg in legs:
        driver.release(leg)
    driver.assert_idle()


def test_pinning_what_is_held_is_answered_too() -> None:
    driver = Driver()
    leg = held(driver)
    driver.apply(Pin(leg), Pin(leg_id("unknown")))
    driver.run()
    assert [event.leg for event in driver.of(LegPinned)] == [leg]
    assert [event.leg for event in driver.of(LeaseEvicted)] == [leg_id("unknown")]


def test_a_retained_prefix_is_a_hit_and_stays_retained() -> None:
    driver = Driver(16)
    leg = held(driver, num_tokens=48)
    driver.apply(Retain(leg), Retain(leg))
    local = driver.local(request("l", prompt(60), max_tokens=2))
    driver.run()
    assert driver.num_cached(local) == 48
    driver.apply(Pin(leg))
    driver.run()
    assert driver.of(LegPinned, leg)
    assert driver.kv_of(leg) == driver.model.chain(None, prompt(48))


def test_retain_before_the_end_is_ignored() -> None:
    driver = Driver(max_num_batched_tokens=16)
    leg = driver.prefill(request("p", prompt(60)))
    driver.step()
    driver.apply(Retain(leg))
    assert driver.core.snapshot().free_blocks == 60
    driver.run()
    assert driver.kv_of(leg) == driver.model.chain(None, prompt(60))


@pytest.mark.parametrize("retained", [False, True])
def test_a_reader_in_flight_keeps_the_blocks_until_quiesced(retained: bool) -> None:
    driver = Driver(4)
    leg = held(driver, num_tokens=60)
    if retained:
        driver.apply(Retain(leg))
    driver.release(leg, in_flight=True)
    assert driver.core.snapshot().num_quarantined_blocks == 4
    assert driver.core.snapshot().num_leases == 0
    driver.local(request("next", prompt(40, 1), max_tokens=2))
    driver.run()
    assert not driver.of(LegAdmitted, leg_id("next"))
    assert driver.kv_of(leg) == driver.model.chain(None, prompt(60)), "the reader reads what it may"
    driver.apply(Quiesced(leg))
    driver.run()
    assert (leg_id("next"), 0) in driver.finished
    driver.assert_idle()


# ── the end ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_abort_is_legal_in_every_state(num_steps: int) -> None:
    driver = Driver(max_num_batched_tokens=40)
    leg = driver.prefill(request("p", prompt(100)))
    for _ in range(num_steps):
        driver.step()
    driver.abort(leg)
    driver.abort(leg)
    driver.release(leg)
    driver.assert_idle()
    assert not driver.of(LegFailed)


def test_an_aborted_choice_is_not_sampled_and_its_leg_is_held_all_the_same() -> None:
    driver = Driver(max_num_batched_tokens=40)
    leg = driver.prefill(request("p", prompt(100), n=3))
    driver.step()
    driver.abort(leg, 0)
    driver.run()
    assert set(driver.tokens) == {(leg, 1), (leg, 2)}
    driver.abort(leg, 1)
    driver.abort(leg, 2)
    driver.run()
    assert driver.core.snapshot().num_leases == 1, "a reader may be at it"
    assert driver.kv_of(leg) == driver.model.chain(None, prompt(100))
    driver.release(leg)
    driver.assert_idle()


@pytest.mark.parametrize("non_finite", [False, True])
def test_a_failed_leg_waits_for_its_readers(non_finite: bool) -> None:
    driver = Driver(max_num_batched_tokens=40)
    leg = driver.prefill(request("p", prompt(80)))
    driver.step()
    if non_finite:
        driver.runner.non_finite = {driver.runner.steps[0][0].row_id}
    else:
        driver.runner.fault = lambda _: (_ for _ in ()).throw(ValueError("secret"))
    driver.step()
    (event,) = driver.of(LegFailed, leg)
    assert event.cause is (Cause.NON_FINITE_LOGITS if non_finite else Cause.STEP_FAILED)
    assert "secret" not in event.detail
    assert driver.core.snapshot().num_quarantined_blocks == 5
    driver.apply(Quiesced(leg))
    driver.assert_idle()
