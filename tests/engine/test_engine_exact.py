"""The engine's own exact gate: the same tokens, and the same bits of log-probabilities, whatever
shares the batch and however the work is cut. Real model, real sampler, batch-invariant mode."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from baton.engine.commands import AddLocal
from baton.engine.config import EngineConfig
from baton.engine.core import EngineCore
from baton.engine.events import LegAdmitted, LegFailed, LegPreempted, LegTokens
from baton.engine.loader import load_runner
from baton.engine.runner import ModelRunner
from baton.engine.runner_config import RunnerConfig
from baton.types import LegId, Logprobs, Request, SamplingParams

MAX_LEN = 256
POOL_BYTES = 4 << 20  # 256 blocks of 16 tokens: 2 layers, 2 KV heads of 16, float32


def load(model: Path, block_size: int) -> ModelRunner:
    return load_runner(
        RunnerConfig(
            str(model),
            dtype="float32",
            device="cpu",
            block_size=block_size,
            max_model_len=MAX_LEN,
            kv_cache_memory_bytes=POOL_BYTES,
            batch_invariant=True,
            show_progress=False,
        )
    )


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> ModelRunner:
    return load(tiny_model, block_size=16)


@dataclass
class Run:
    """What an engine produced: (request id, choice) → tokens with their log-probabilities."""

    tokens: dict[tuple[str, int], list[tuple[int, Logprobs | None]]] = field(default_factory=dict)
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_steps: int = 0

    def ids(self, request_id: str, choice: int) -> tuple[int, ...]:
        return tuple(token_id for token_id, _ in self.tokens[request_id, choice])


def run(runner: ModelRunner, requests: Sequence[Request], **limits: int | bool) -> Run:
    """All `requests` at once through a new engine; nothing may be left in it."""
    settings = {
        "num_blocks": runner.kv_cache.num_blocks,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        **limits,
    }
    config = EngineConfig(
        block_size=runner.kv_cache.block_size,
        max_model_len=MAX_LEN,
        eos_token_ids=runner.info.eos_token_ids,
        vocab_size=runner.info.vocab_size,
        num_layers=runner.info.num_layers,
        **settings,  # type: ignore[arg-type]
    )
    core = EngineCore(config, runner)
    for request in requests:
        core.apply(AddLocal(LegId(request.request_id, 0), request))
    result = Run()
    while core.has_work:
        output = core.step()
        for event in output.events if output is not None else ():
            match event:
                case LegTokens(chunk):
                    pairs = zip(chunk.token_ids, chunk.logprobs or (None,), strict=False)
                    result.tokens.setdefault((chunk.leg.request_id, chunk.choice), []).extend(pairs)
                case LegPreempted():
                    result.num_preemptions += 1
                case LegAdmitted():
                    result.num_cached_tokens += event.num_cached_tokens
                case LegFailed():
                    pytest.fail(f"{event.cause.name}: {event.detail}")
        result.num_steps += 1
    core.check_integrity()
    assert core.pool.num_free == config.num_blocks
    return result


def make_requests() -> list[Request]:
    """Short and long prompts; greedy, sampled, cut, penalised; one and several choices."""
    variants = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=1, logprobs=3),
        SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=2, logprobs=0),
        SamplingParams(temperature=1.2, min_p=0.02, frequency_penalty=0.7, seed=3, n=3),
        SamplingParams(temperature=0.0, repetition_penalty=1.4, min_tokens=8, logprobs=5),
        SamplingParams(temperature=0.7, seed=4, n=2, presence_penalty=0.5),
    )
    rng = random.Random(0)
    lengths = (1, 15, 16, 17, 40, 130)
    requests = []
    for index, (length, params) in enumerate(zip(lengths, variants, strict=True)):
        prompt = tuple(rng.randrange(256) for _ in range(length))
        sampling = replace(params, max_tokens=24 + 3 * index)
        requests.append(Request(f"r{index}", prompt, sampling))
    return requests


REQUESTS = make_requests()


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> Run:
    """Each request in an engine of its own."""
    result = Run()
    for request in REQUESTS:
        result.tokens |= run(runner, [request], enable_prefix_caching=False).tokens
    assert len({tuple(tokens) for tokens in result.tokens.values()}) == len(result.tokens)
    return result


@pytest.mark.parametrize("order", ["as given", "reversed"])
def test_batched_equals_alone(runner: ModelRunner, alone: Run, order: str) -> None:
    requests = REQUESTS if order == "as given" else REQUESTS[::-1]
    together = run(runner, requests)
    assert together.num_steps < 60
    assert together.tokens == alone.tokens


@pytest.mark.parametrize("budget", [16, 23, 48])
def test_chunked_equals_whole(runner: ModelRunner, alone: Run, budget: int) -> None:
    chunked = run(runner, REQUESTS, max_num_batched_tokens=budget)
    assert chunked.tokens == alone.tokens


def test_preempted_equals_not_preempted(runner: ModelRunner, alone: Run) -> None:
    """Blocks for the longest request and little more: somebody has to give way, and recomputes."""
    preempted = run(runner, REQUESTS, num_blocks=16, enable_prefix_caching=False)
    assert preempted.num_preemptions > 0
    assert preempted.tokens == alone.tokens


def test_prefix_hit_equals_cold(runner: ModelRunner) -> None:
    """Requests that share 0, 1 and several blocks with one another, some while those blocks are
    being computed, against engines without a cache."""
    base = REQUESTS[-1].prompt_token_ids
    params = SamplingParams(temperature=0.9, seed=9, max_tokens=20, logprobs=2)
    requests = [
        Request(f"p{i}", base[:length] + tail, params)
        for i, (length, tail) in enumerate(
            [(130, ()), (130, (1, 2)), (64, (3,)), (20, (4,) * 30), (16, ()), (5, (7,)), (130, ())]
        )
    ]
    cold = Run()
    for request in requests:
        cold.tokens |= run(runner, [request], enable_prefix_caching=False).tokens
    warm = run(runner, requests, max_num_batched_tokens=32)
    assert warm.num_cached_tokens > 0
    assert warm.tokens == cold.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choices_equal_choices_run_alone(runner: ModelRunner, temperature: float) -> None:
    params = SamplingParams(n=4, seed=11, temperature=temperature, max_tokens=30, logprobs=1)
    request = Request("n4", REQUESTS[4].prompt_token_ids, params)
    together = run(runner, [request])
    for choice in range(4):
        others = frozenset(range(4)) - {choice}
        single = run(runner, [replace(request, finished_choices=others)])
        assert single.tokens["n4", choice] == together.tokens["n4", choice]
    assert len({together.ids("n4", c) for c in range(4)}) == (4 if temperature else 1)


@pytest.mark.parametrize("num_committed", [1, 7, 23])
def test_resumed_equals_uninterrupted(runner: ModelRunner, alone: Run, num_committed: int) -> None:
    """Start, resume, retry and migration are one call with more committed output."""
    resumed = []
    for request in REQUESTS:
        choices = range(request.sampling.n)
        committed = tuple(alone.ids(request.request_id, c)[:num_committed] for c in choices)
        done = frozenset(
            c for c in choices if len(alone.ids(request.request_id, c)) <= num_committed
        )
        if len(done) < request.sampling.n:
            resumed.append(replace(request, output_token_ids=committed, finished_choices=done))
    result = run(runner, resumed)
    expected = {
        key: tokens[num_committed:]
        for key, tokens in alone.tokens.items()
        if len(tokens) > num_committed
    }
    assert result.tokens == expected


def test_block_size_does_not_matter(tiny_model: Path, alone: Run) -> None:
    assert run(load(tiny_model, block_size=64), REQUESTS).tokens == alone.tokens


def test_the_gate_notices_a_wrong_slot(runner: ModelRunner, alone: Run) -> None:
    """The comparisons above can fail: damage to one cached token changes what follows."""
    request = REQUESTS[-1]
    config = EngineConfig(
        num_blocks=64,
        max_model_len=MAX_LEN,
        eos_token_ids=runner.info.eos_token_ids,
        vocab_size=runner.info.vocab_size,
    )
    core = EngineCore(config, runner)
    core.apply(AddLocal(LegId("x", 0), replace(request, request_id="x")))
    blocks: tuple[int, ...] = ()
    tokens: list[tuple[int, Logprobs | None]] = []
    while core.has_work:
        output = core.step()
        for event in output.events if output is not None else ():
            if isinstance(event, LegAdmitted):
                blocks = tuple(event.block_ids)
            if isinstance(event, LegTokens) and event.chunk.choice == 0:
                if not tokens:
                    runner.kv_cache.tensor[:, :, blocks[2], 5] += 3.0
                tokens += [(t, None) for t in event.chunk.token_ids]
    assert tokens != alone.tokens[request.request_id, 0]
