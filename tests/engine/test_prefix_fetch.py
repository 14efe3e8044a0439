"""Legs that wait for a prefix from elsewhere, and prefixes that are pinned for others."""

from dataclasses import replace

import pytest

from baton.engine.commands import (
    AddLocal,
    AddPrefill,
    PinPrefix,
    PrefixArrived,
    Quiesced,
    UnpinPrefix,
)
from baton.engine.events import LegAdmitted, LegFailed, LegPreempted, PrefixReserved
from baton.hashing import prefix_hashes, root_hash
from baton.types import LegId, Request
from tests.engine.driver import Driver, leg_id, prompt, request

LEN = 100  # six blocks of 16, and four tokens


def fetching(
    driver: Driver, name: str, wanted: int = 96, local: bool = False, priority: int = 0
) -> LegId:
    """A leg that may fetch so many tokens of its prompt."""
    r = replace(asked(name), priority=priority)
    make = AddLocal if local else AddPrefill
    driver.apply(make(leg_id(name), r, wanted))
    driver.run()
    return leg_id(name)


def asked(name: str, num_tokens: int = LEN, **sampling: object) -> Request:
    return request(name, prompt(num_tokens), **sampling)


def arrive(driver: Driver, leg: LegId, valid_tokens: int) -> None:
    """What a transfer does, as far as it gets."""
    reserved = driver.last(PrefixReserved, leg)
    values = driver.model.chain(None, prompt(LEN))
    start = reserved.num_cached_tokens
    driver.import_kv(reserved.block_ids, start, values[start:valid_tokens])
    driver.apply(PrefixArrived(leg, valid_tokens))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("valid_tokens", [0, 16, 40, 96])
def test_what_came_is_not_computed(valid_tokens: int, local: bool) -> None:
    driver = Driver()
    leg = fetching(driver, "a", local=local)
    reserved = driver.last(PrefixReserved, leg)
    assert (reserved.num_cached_tokens, reserved.num_fetch_tokens) == (0, 96)
    assert reserved.hashes == tuple(prefix_hashes(root_hash(b"", b""), prompt(LEN)))
    assert driver.runner.num_tokens_computed == 0
    assert driver.stored == set()  # nothing is told before it has come
    arrive(driver, leg, valid_tokens)
    driver.run()
    assert driver.last(LegAdmitted, leg).num_cached_tokens == valid_tokens
    if local:
        driver.assert_complete(leg, asked("a"))
    computed = driver.runner.num_tokens_computed - (7 if local else 0)
    assert computed == LEN - valid_tokens
    assert driver.stored == set(reserved.hashes)


@pytest.mark.parametrize(
    ("known", "wanted", "expected"),
    [
        (0, 96, (0, 96)),
        (48, 96, (48, 96)),  # the rest of it
        (96, 96, None),
        (0, 0, None),
        (80, 95, None),  # less than a block
        (0, 100, (0, 99)),  # never the last token
    ],
)
def test_only_what_is_not_here(known: int, wanted: int, expected: tuple[int, int] | None) -> None:
    driver = Driver()
    if known:
        driver.know(known)
    leg = fetching(driver, "a", wanted)
    events = driver.of(PrefixReserved, leg)
    found = [(event.num_cached_tokens, event.num_fetch_tokens) for event in events]
    assert found == ([] if expected is None else [expected])


def test_nothing_is_fetched_that_somebody_computes() -> None:
    driver = Driver(max_num_batched_tokens=16)
    driver.apply(AddPrefill(leg_id("first"), asked("first")))
    driver.step()
    leg = fetching(driver, "second")
    assert driver.of(PrefixReserved, leg) == []
    assert driver.runner.num_tokens_computed == LEN + 4


def test_nothing_is_fetched_without_a_prefix_cache() -> None:
    driver = Driver(enable_prefix_caching=False)
    assert driver.of(PrefixReserved, fetching(driver, "a")) == []


def test_others_wait_with_it_and_are_not_in_the_way() -> None:
    """Even when they hold every seat."""
    driver = Driver(max_num_seqs=2)
    leg = fetching(driver, "a")
    waiting = [driver.local(asked(name)) for name in ("b", "c")]
    driver.run()
    assert driver.runner.num_tokens_computed == 0
    arrive(driver, leg, 40)
    driver.run()
    for name, other in zip(("b", "c"), waiting, strict=True):
        driver.assert_complete(other, asked(name))
    # Two blocks came (others cannot use a part of one), the other four were computed once; then
    # the tails of three prompts, and seven tokens of two answers.
    assert driver.runner.num_tokens_computed == 4 * 16 + 3 * 4 + 2 * 7


def test_other_prompts_go_on_meanwhile() -> None:
    driver = Driver()
    fetching(driver, "a")
    other = request("other", prompt(50, seed=5))
    leg = driver.local(other)
    driver.run()
    driver.assert_complete(leg, other)


def test_blocks_that_are_written_are_nobodys_until_the_writer_has_stopped() -> None:
    driver = Driver()
    leg = fetching(driver, "a")
    other = driver.local(asked("b"))
    driver.run()
    driver.abort(leg, in_flight=True)
    driver.run()
    assert driver.runner.num_tokens_computed == 0, "computed into blocks that are being written"
    driver.apply(Quiesced(leg))
    driver.run()
    driver.assert_complete(other, asked("b"))
    assert driver.runner.num_tokens_computed == LEN + 7


def test_aborted_before_anything_is_written() -> None:
    driver = Driver()
    leg = fetching(driver, "a")
    other = driver.local(asked("b"))
    driver.abort(leg)
    driver.run()
    driver.assert_complete(other, asked("b"))


def test_a_leg_that_the_engine_fails_waits_in_quarantine() -> None:
    driver = Driver()
    leg = fetching(driver, "a")
    driver.apply(AddPrefill(leg, asked("a")))  # the same id again
    driver.run()
    assert driver.of(LegFailed, leg)
    assert driver.core.pool.num_quarantined == 7
    driver.apply(Quiesced(leg))
    assert driver.core.pool.num_free == driver.config.num_blocks


def test_a_fetched_prefill_is_never_preempted() -> None:
    """Not even while it waits for a seat, and whoever has that lacks blocks."""
    driver = Driver(num_blocks=16, max_num_seqs=1)
    leg = fetching(driver, "a", priority=1)  # the last in the order
    long = request("o", prompt(20, seed=5), max_tokens=140)
    other = driver.local(long)
    while not driver.tokens[other, 0]:
        driver.step()
    arrive(driver, leg, 96)
    driver.run()
    assert driver.of(LegPreempted, leg) == []
    assert driver.of(LegPreempted, other)
    assert driver.last(LegAdmitted, leg).num_cached_tokens == 96
    assert driver.tokens[leg, 0]
    driver.release(leg)
    driver.run()
    driver.assert_complete(other, long)


# ── pins ─────────────────────────────────────────────────────────────────────────────────────────


def pin(driver: Driver, number: int, num_tokens: int) -> tuple[int, int]:
    """(blocks, tokens) that the engine pinned of so long a chain."""
    chain = tuple(prefix_hashes(root_hash(b"", b""), prompt(num_tokens)))
    driver.apply(PinPrefix(number, chain))
    driver.step()
    (pinned,) = driver.outputs[-1].pinned
    assert pinned.pin == number
    return len(pinned.block_ids), pinned.num_tokens


@pytest.mark.parametrize(("known", "asked_for", "held"), [(0, 96, 0), (50, 96, 48), (100, 64, 64)])
def test_a_pin_holds_what_is_ready(known: int, asked_for: int, held: int) -> None:
    driver = Driver()
    if known:
        driver.know(known)
    assert pin(driver, 1, asked_for) == (held // 16, held)
    assert driver.core.pool.num_free == driver.config.num_blocks - held // 16
    driver.apply(UnpinPrefix(1))
    assert driver.core.pool.num_free == driver.config.num_blocks


def test_a_pin_does_not_wait_for_what_is_being_computed() -> None:
    driver = Driver(max_num_batched_tokens=32)
    driver.apply(AddPrefill(leg_id("a"), asked("a")))
    driver.step()
    assert pin(driver, 1, 96)[1] <= 64  # the second chunk was in the step that answered
    driver.apply(UnpinPrefix(1))


def test_pinned_blocks_are_not_evicted() -> None:
    driver = Driver(num_blocks=8)
    driver.know(96)
    assert pin(driver, 1, 96) == (6, 96)
    assert pin(driver, 2, 32) == (2, 32)  # readers share
    driver.apply(UnpinPrefix(1))
    leg = driver.local(request("other", prompt(60, seed=9), max_tokens=1))
    driver.run()
    driver.assert_complete(leg, request("other", prompt(60, seed=9), max_tokens=1))
    assert pin(driver, 3, 32) == (2, 32)
    for number in (2, 3):
        driver.apply(UnpinPrefix(number))
    assert driver.core.pool.num_free == 8
