"""Log-probabilities of prompts: against transformers, in chunks, past caches and preemption."""

from pathlib import Path

import pytest
import torch

from baton.engine.batch import Sampled
from baton.engine.commands import AddLocal
from baton.engine.events import LegFailed, LegPreempted, LegScored
from baton.engine.runner import ModelRunner
from baton.types import LegId, Logprobs, Request, SamplingParams
from tests.engine.driver import Driver, prompt, request
from tests.engine.tiny_models import (
    load_tiny_runner,
    make_core,
    random_prompts,
    reference_model,
    save_tiny_model,
)


def scores_of(driver: Driver, leg: LegId) -> list[Logprobs]:
    scores: list[Logprobs] = []
    for event in driver.of(LegScored, leg):
        assert event.start == len(scores) + 1, "a gap, or told twice"
        scores += event.logprobs
    return scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen3")


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    return load_tiny_runner(folder, dtype="float32", batch_invariant=True)


def score(runner: ModelRunner, token_ids: list[int], num_top: int, chunk: int) -> list[Logprobs]:
    core = make_core(runner, max_num_batched_tokens=chunk, max_num_seqs=8)
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=1, prompt_logprobs=num_top)
    scores: list[Logprobs] = []
    for name in ("first", "again"):  # the second finds the whole prompt in the cache
        core.apply(AddLocal(LegId(name, 0), Request(name, tuple(token_ids), params)))
        scores = []
        while core.has_work:
            output = core.step()
            for event in output.events if output is not None else ():
                assert not isinstance(event, LegFailed), event
                if isinstance(event, LegScored):
                    scores += event.logprobs
    return scores


@pytest.mark.parametrize("length", [2, 17, 130])
def test_scores_are_those_of_transformers(folder: Path, runner: ModelRunner, length: int) -> None:
    (token_ids,) = random_prompts(length, seed=length)
    with torch.inference_mode():
        logits = reference_model(folder)(torch.tensor([token_ids])).logits[0].double()
    expected = logits.log_softmax(-1)
    for chunk in (9, 64, 256):
        scores = score(runner, token_ids, 3, chunk)
        assert len(scores) == length - 1
        for place, (entry, target) in enumerate(zip(scores, token_ids[1:], strict=True)):
            row = expected[place]
            assert entry.logprob == pytest.approx(float(row[target]), abs=1e-4)
            assert [value for _, value in entry.top] == pytest.approx(
                row.topk(3).values.tolist(), abs=1e-4
            )
            assert entry.rank == 1 + int((row > row[target] + 1e-6).sum())


def test_scores_do_not_depend_on_chunks(runner: ModelRunner) -> None:
    (token_ids,) = random_prompts(150, seed=5)
    whole = score(runner, token_ids, 2, 512)
    assert all(score(runner, token_ids, 2, chunk) == whole for chunk in (8, 33, 100))


def test_a_prompt_of_one_token_has_none(runner: ModelRunner) -> None:
    assert score(runner, [7], 2, 64) == []


def test_the_prefix_cache_is_not_read_but_filled() -> None:
    driver = Driver()
    driver.know(48)
    leg = driver.local(request("s", prompt(60), prompt_logprobs=0, n=2, temperature=1.0, seed=1))
    driver.run()
    assert driver.num_cached(leg) == 0
    assert len(scores_of(driver, leg)) == 59
    after = driver.local(request("t", prompt(60)))
    driver.run()
    assert driver.num_cached(after) == 48
    driver.assert_idle()


def test_a_preempted_leg_tells_each_score_once() -> None:
    driver = Driver(num_blocks=14, max_num_batched_tokens=32)
    legs = [
        driver.local(request(f"s{i}", prompt(70, i), prompt_logprobs=1, max_tokens=60))
        for i in range(3)
    ]
    driver.run()
    assert driver.of(LegPreempted)
    assert [len(scores_of(driver, leg)) for leg in legs] == [69] * 3
    driver.assert_idle()


def test_only_local_legs_score() -> None:
    driver = Driver()
    leg = driver.prefill(request("s", prompt(40), prompt_logprobs=1))
    driver.run()
    assert driver.of(LegScored) == []
    driver.release(leg)
    driver.assert_idle()


def test_a_runner_that_forgets_a_score_fails_the_step() -> None:
    driver = Driver()
    run = driver.runner.run

    def forgetful(batch: object) -> dict[int, tuple[Sampled, ...]]:
        return {row_id: answer[1:] for row_id, answer in run(batch).items()}  # type: ignore[arg-type]

    driver.runner.run = forgetful  # type: ignore[method-assign]
    leg = driver.local(request("s", prompt(40), prompt_logprobs=1))
    driver.run()
    assert driver.of(LegFailed, leg)


def test_targets_are_what_follows() -> None:
    driver = Driver(max_num_batched_tokens=16)
    seen: list[tuple[int, int]] = []
    driver.runner.fault = lambda batch: seen.extend(
        (row.start, len(row.scoring.token_ids)) for row in batch.rows if row.scoring is not None
    )
    driver.local(request("s", prompt(40), prompt_logprobs=1))
    driver.run()
    assert seen == [(0, 16), (16, 16), (32, 7)]
