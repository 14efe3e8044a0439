"""The latency and link models: they converge, follow drift, shrug off outliers, and stay sane."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.latency import LatencyModel, LinkModel
from baton.types import StepTiming, TransferStats


def true_ms(timing: StepTiming) -> float:
    attended = timing.num_cached_tokens + timing.num_prefill_tokens / 2
    return (
        4.0
        + 0.2 * timing.num_prefill_tokens
        + 2e-5 * timing.num_prefill_tokens * attended
        + 0.6 * timing.num_decodes
        + 1e-3 * timing.context_tokens
    )


def random_step(rng: random.Random, noise: float = 0.05) -> StepTiming:
    prefill = rng.choice([0, 0, rng.randrange(1, 512), 512])
    decodes = rng.randrange(0, 16) if prefill else rng.randrange(1, 16)
    step = StepTiming(
        prefill, rng.randrange(2048) if prefill else 0, decodes, decodes * rng.randrange(10, 1500)
    )
    ms = true_ms(step) * rng.uniform(1 - noise, 1 + noise)
    return StepTiming(
        step.num_prefill_tokens,
        step.num_cached_tokens,
        step.num_decodes,
        step.context_tokens,
        ms,
    )


@pytest.mark.parametrize("seed", range(5))
def test_converges(seed: int) -> None:
    rng = random.Random(seed)
    model = LatencyModel()
    for _ in range(300):
        model.observe(random_step(rng))
    for _ in range(50):
        step = random_step(rng)
        assert model.step_ms(step) == pytest.approx(true_ms(step), rel=0.15)
    assert model.decode_step_ms(8, 4000) == pytest.approx(4 + 4.8 + 4, rel=0.15)
    # Two chunks of 512 tokens: two steps' overhead.
    assert model.prefill_ms(1024) == pytest.approx(8 + 204.8 + 2e-5 * 1024 * 512, rel=0.15)


def test_outliers_and_warm_up_do_not_mislead() -> None:
    rng = random.Random(0)
    model = LatencyModel()
    for i in range(300):
        step = random_step(rng)
        slow = 100.0 if i < 3 or i % 29 == 28 else 1.0
        model.observe(
            StepTiming(
                step.num_prefill_tokens,
                step.num_cached_tokens,
                step.num_decodes,
                step.context_tokens,
                step.duration_ms * slow,
            )
        )
    errors = [
        abs(model.step_ms(step) / true_ms(step) - 1)
        for step in (random_step(rng) for _ in range(50))
    ]
    assert sorted(errors)[25] < 0.2


def test_follows_a_worker_that_became_slower() -> None:
    rng = random.Random(0)
    model = LatencyModel()
    for _ in range(200):
        model.observe(random_step(rng))
    before = model.prefill_ms(512)
    for _ in range(300):
        step = random_step(rng)
        model.observe(
            StepTiming(
                step.num_prefill_tokens,
                step.num_cached_tokens,
                step.num_decodes,
                step.context_tokens,
                step.duration_ms * 2,
            )
        )
    assert model.prefill_ms(512) == pytest.approx(2 * before, rel=0.25)


def test_decode_alone_leaves_prefill_at_its_prior() -> None:
    model = LatencyModel()
    prior = model.prefill_ms(500)
    rng = random.Random(0)
    for _ in range(200):
        model.observe(StepTiming(0, 0, 4, rng.randrange(100, 4000), rng.uniform(10, 12)))
    assert model.num_prefill_steps == 0
    assert model.prefill_ms(500) >= prior * 0.9


steps = st.builds(
    StepTiming,
    st.integers(0, 100_000),
    st.integers(0, 100_000),
    st.integers(0, 1000),
    st.integers(0, 10**7),
    st.one_of(st.floats(0, 1e7), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-300, 1e300])),
)


@settings(max_examples=60)
@given(st.lists(steps, max_size=40), st.integers(0, 10**6), st.integers(0, 10**6))
def test_never_negative_never_nan(history: list[StepTiming], uncached: int, cached: int) -> None:
    model = LatencyModel()
    for step in history:
        model.observe(step)
    for value in (
        model.prefill_ms(uncached, cached),
        model.decode_step_ms(uncached, cached),
        model.prefill_ms(-1),
        model.decode_step_ms(0, 5),
    ):
        assert math.isfinite(value)
        assert value >= 0


def test_link_learns_its_rate_and_counts_its_queue() -> None:
    link = LinkModel()
    prior = link.transfer_ms(10**6)
    for _ in range(20):
        link.observe(10**6, 0.5)
    assert link.transfer_ms(10**6) == pytest.approx(link.overhead_ms + 0.5, rel=0.01)
    assert link.transfer_ms(10**6) < prior
    link.started(3 * 10**6)
    assert link.backlog_ms() == pytest.approx(1.5, rel=0.01)
    assert link.transfer_ms(10**6) == pytest.approx(link.overhead_ms + 2.0, rel=0.01)
    link.ended(3 * 10**6)
    assert link.in_flight_bytes == 0


def test_what_waited_for_the_prefill_does_not_lower_the_rate() -> None:
    link = LinkModel()
    link.learn(TransferStats("ucx", 3 * 10**6, duration_ms=900.0, ready_bytes=10**6, ready_ms=1.0))
    assert link.bytes_per_ms == 1e6
    link.learn(TransferStats("ucx", 3 * 10**6, duration_ms=900.0))
    assert link.bytes_per_ms == 1e6
    link.learn(TransferStats("ucx", 3 * 10**6, duration_ms=1.0))
    assert link.bytes_per_ms > 1e6


def test_a_slow_fetch_hardly_lowers_the_rate() -> None:
    link = LinkModel()
    link.observe(10**6, 1.0)
    link.observe(10**6, 100.0)
    assert link.bytes_per_ms > 0.85e6
    link.observe(100, 1000.0)
    assert link.bytes_per_ms > 0.85e6, "small fetches say nothing of the rate"


@given(st.lists(st.tuples(st.integers(0, 10**12), st.floats(allow_nan=True)), max_size=20))
def test_link_stays_sane(history: list[tuple[int, float]]) -> None:
    link = LinkModel()
    for num_bytes, ms in history:
        link.observe(num_bytes, ms)
    value = link.transfer_ms(10**9)
    assert math.isfinite(value)
    assert value > 0
