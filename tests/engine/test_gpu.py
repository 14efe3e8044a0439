"""An engine on a CUDA device against the same engine on CPU, in float32: `pytest -m gpu`, with
TRITON_INTERPRET=0."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baton.engine.commands import AddLocal
from baton.engine.core import EngineCore
from baton.engine.events import LegAdmitted, LegFailed, LegTokens
from baton.engine.runner import ModelRunner
from baton.kernels.sampling import gumbel, noise_key, token_hash
from baton.types import LegId, Logprobs, Request, SamplingParams
from tests.engine.tiny_models import load_tiny_runner, make_core, random_prompts, save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FAMILIES = ["llama3-rope", "mistral-window", "qwen2-some-windows", "qwen3"]
PROMPT_LENS = (1, 5, 16, 17, 33, 64, 70, 100)
MOST_LOGPROBS = 20
DEFECT = 1e-4  # a larger gap between the two candidates is a defect (ARCHITECTURE, Same tokens)
Tokens = dict[tuple[int, int], list[tuple[int, Logprobs]]]  # (prompt, choice) → what was sampled


def run(runner: ModelRunner, prompts: list[list[int]], params: SamplingParams) -> Tokens:
    """All prompts at once in chunks of 32 tokens; a prefix that two share is cached."""
    core = make_core(runner, max_num_batched_tokens=32, max_num_seqs=16)
    for index, prompt in enumerate(prompts):
        core.apply(AddLocal(LegId(str(index), 0), Request(str(index), tuple(prompt), params)))
    return collect(core)


def collect(core: EngineCore) -> Tokens:
    tokens: Tokens = {}
    while core.has_work:
        output = core.step()
        for event in output.events if output is not None else ():
            assert not isinstance(event, LegFailed), event
            if isinstance(event, LegTokens):
                chunk = event.chunk
                pairs = zip(chunk.token_ids, chunk.logprobs, strict=True)
                key = int(chunk.leg.request_id), chunk.choice
                tokens.setdefault(key, []).extend(pairs)
    core.check_integrity()
    return tokens


def score(token_id: int, logprobs: Logprobs, params: SamplingParams, seed: int, at: int) -> float:
    """What decided between candidates: logit / temperature + noise, up to a constant."""
    logprob = dict(logprobs.top)[token_id]
    if params.temperature == 0:
        return logprob
    key = torch.tensor(noise_key(seed, at))
    noise = gumbel(token_hash(key, torch.tensor(token_id)))
    return logprob / params.temperature + float(noise)


def assert_same(expected: Tokens, got: Tokens, params: SamplingParams, lens: list[int]) -> None:
    """Equal, or parted where the two candidates were closer than what counts as a defect."""
    assert expected.keys() == got.keys()
    for (prompt, choice), wanted in expected.items():
        for index, ((a, logprobs), (b, _)) in enumerate(
            zip(wanted, got[prompt, choice], strict=True)
        ):
            if a == b:
                continue
            assert choice == 0, "the seeds of other choices are not known here"
            at = lens[prompt] + index
            gap = abs(
                score(a, logprobs, params, params.seed or 0, at)
                - score(b, logprobs, params, params.seed or 0, at)
            )
            print(f"prompt {prompt}, token {index}: {a} and {b}, a gap of {gap:.2e}")
            assert gap <= DEFECT
            break  # what follows is another text


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path, request.param)


@pytest.fixture(params=["graphs", "eager"])
def runners(
    request: pytest.FixtureRequest, folder: Path
) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    """On CPU and on CUDA."""
    options = {"dtype": "float32", "max_num_seqs": 16}
    cpu = load_tiny_runner(folder, device="cpu", **options)
    cuda = load_tiny_runner(
        folder, device="cuda", enforce_eager=request.param == "eager", **options
    )
    yield cpu, cuda
    cpu.close()
    cuda.close()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=64, logprobs=MOST_LOGPROBS, ignore_eos=True),
        SamplingParams(
            temperature=0.8, seed=11, max_tokens=64, logprobs=MOST_LOGPROBS, ignore_eos=True
        ),
        SamplingParams(
            temperature=1.0,
            top_p=0.9,
            top_k=20,
            seed=3,
            max_tokens=32,
            logprobs=MOST_LOGPROBS,
            ignore_eos=True,
        ),
    ],
    ids=["greedy", "seeded", "truncated"],
)
def test_tokens_equal_those_on_cpu(
    runners: tuple[ModelRunner, ModelRunner], params: SamplingParams
) -> None:
    prompts = random_prompts(*PROMPT_LENS)
    cpu, cuda = runners
    assert_same(
        run(cpu, prompts, params), run(cuda, prompts, params), params, list(map(len, prompts))
    )


def test_choices_and_cached_prefixes(runners: tuple[ModelRunner, ModelRunner]) -> None:
    """Four choices of one prompt (shared blocks, copies on write), then its cached prefix."""
    (prompt,) = random_prompts(70)
    params = SamplingParams(
        n=4, temperature=0.9, seed=5, max_tokens=24, ignore_eos=True, logprobs=1
    )
    results, num_cached = [], []
    for runner in runners:
        core = make_core(runner, max_num_seqs=16)
        for name in ("0", "1"):
            core.apply(AddLocal(LegId(name, 0), Request(name, tuple(prompt), params)))
            while core.has_work:
                output = core.step()
                for event in output.events if output is not None else ():
                    assert not isinstance(event, LegFailed), event
                    if isinstance(event, LegAdmitted):
                        num_cached.append(event.num_cached_tokens)
                    if isinstance(event, LegTokens):
                        results.append((name, event.chunk.choice, event.chunk.token_ids))
        core.check_integrity()
    half = len(results) // 2
    assert sorted(results[:half]) == sorted(results[half:])
    assert num_cached == [0, 64, 0, 64]


def test_a_broken_row_fails_alone(tmp_path: Path) -> None:
    """A token whose embedding is not a number: that row has no token, the others have theirs."""
    runner = load_tiny_runner(save_tiny_model(tmp_path, "llama"), device="cuda", max_num_seqs=4)
    good, bad = random_prompts(20, 20)
    bad[5] = 7
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0)
    expected = run(runner, [good], params)
    runner._model.embedding[7] = float("nan")
    core = make_core(runner)
    for index, prompt in enumerate((good, bad)):
        core.apply(AddLocal(LegId(str(index), 0), Request(str(index), tuple(prompt), params)))
    events = [
        event
        for _ in iter(lambda: core.has_work, False)
        if (output := core.step()) is not None
        for event in output.events
    ]
    assert [e.leg.request_id for e in events if isinstance(e, LegFailed)] == ["1"]
    tokens = [i for e in events if isinstance(e, LegTokens) for i in e.chunk.token_ids]
    assert tokens == [token_id for token_id, _ in expected[0, 0]]
    assert runner.kv_cache.tensor.isfinite().all()
    runner.close()
