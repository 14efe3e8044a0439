"""Every family against transformers, on tiny random checkpoints."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from baton.engine.batch import Batch
from baton.engine.runner import ModelRunner
from baton.types import SamplingParams
from tests.engine.rows import chunked, hidden_states, row
from tests.engine.tiny_models import (
    FAMILIES,
    WINDOW,
    generate,
    load_tiny_runner,
    make_core,
    random_prompts,
    reference_model,
    save_tiny_model,
)

PROMPT_LENS = (1, 5, 16, 17, 33, 64, 70, 100)
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """family → its checkpoint, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def runner(folder: Folder, family: str) -> Iterator[ModelRunner]:
    runner = load_tiny_runner(folder(family))
    yield runner
    runner.close()


def logits_of(runner: ModelRunner, prompt: list[int]) -> torch.Tensor:
    return runner.logits(hidden_states(runner, row(prompt)))


def reference_logits(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits


def test_logits_equal_those_of_transformers(
    runner: ModelRunner, folder: Folder, family: str
) -> None:
    model = reference_model(folder(family))
    for prompt in random_prompts(*PROMPT_LENS):
        expected = reference_logits(model, prompt)
        assert expected.std() > 0.1, "a model that says the same of everything tests nothing"
        assert (logits_of(runner, prompt) - expected).abs().max() < 1e-3


def test_greedy_tokens_equal_those_of_transformers(
    runner: ModelRunner, folder: Folder, family: str
) -> None:
    model = reference_model(folder(family))
    model.generation_config.eos_token_id = None
    prompts = random_prompts(*PROMPT_LENS)
    expected = [
        model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=64, min_new_tokens=64
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    # Few tokens a step: prompts come in chunks, next to sequences that decode already.
    core = make_core(runner, max_num_batched_tokens=48, max_num_seqs=8)
    assert generate(core, prompts, params) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)


@pytest.mark.parametrize("chunks", [(100,), (1,) * 100, (16, 84), (37, 1, 62), (99, 1)])
def test_chunks_do_not_change_the_result(runner: ModelRunner, chunks: tuple[int, ...]) -> None:
    (prompt,) = random_prompts(100)
    whole = hidden_states(runner, row(prompt))
    parts = torch.cat(chunked(runner, prompt, chunks, first_block=16))
    assert (parts - whole).abs().max() < 1e-4


def test_scattered_blocks_do_not_change_the_result(runner: ModelRunner) -> None:
    (prompt,) = random_prompts(100)
    whole = hidden_states(runner, row(prompt))
    scattered = row(prompt, block_ids=[40, 3, 17, 18, 2, 90, 33])
    assert (hidden_states(runner, scattered) - whole).abs().max() < 1e-4


def test_rows_of_one_step_do_not_see_each_other(runner: ModelRunner) -> None:
    prompts = random_prompts(*PROMPT_LENS)
    alone = torch.cat([hidden_states(runner, row(prompt)) for prompt in prompts])
    rows = [row(p, first_block=8 * i, row_id=i) for i, p in enumerate(prompts)]
    assert (hidden_states(runner, *rows) - alone).abs().max() < 1e-4


def test_a_window_hides_what_is_behind_it(folder: Folder) -> None:
    runner = load_tiny_runner(folder("mistral-window"))
    one, other = random_prompts(90, 90)
    other[60:] = one[60:]
    last = [hidden_states(runner, row(prompt))[-1] for prompt in (one, other)]
    # Three layers: a token can hear from 3 * (WINDOW - 1) tokens before it, and from no further.
    assert not torch.equal(*last)
    far = [hidden_states(runner, row([7] * n + one))[-1] for n in (0, 3)]
    reach = 3 * (WINDOW - 1) + 1
    changed = [*random_prompts(90 - reach, seed=1)[0], *one[90 - reach :]]
    near = [hidden_states(runner, row(prompt))[-1] for prompt in (one, changed)]
    assert (near[0] - near[1]).abs().max() < 1e-5
    assert (far[0] - far[1]).abs().max() < 1e-2, "positions are relative"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, folder: Folder, dtype: torch.dtype) -> None:
    model = reference_model(folder(family), dtype)
    exact = reference_model(folder(family))
    runner = load_tiny_runner(folder(family), dtype=str(dtype).removeprefix("torch."))
    (prompt,) = random_prompts(70)
    expected, fp32 = reference_logits(model, prompt).float(), reference_logits(exact, prompt)
    logits = logits_of(runner, prompt)
    assert logits.dtype is dtype
    error = (logits.float() - fp32).abs().mean()
    assert error < 1.5 * (expected - fp32).abs().mean(), "no worse than transformers"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"], indirect=True)
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float16), (True, torch.bfloat16)])
def test_sharded_and_tied_checkpoints(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    single = save_tiny_model(tmp_path / "single", family, tied=tied, dtype=dtype)
    sharded = save_tiny_model(
        tmp_path / "sharded", family, tied=tied, dtype=dtype, shard_size="40KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 3
    (prompt,) = random_prompts(40)
    one, many = (load_tiny_runner(path, dtype="float32") for path in (single, sharded))
    logits = logits_of(one, prompt)
    assert torch.equal(logits_of(many, prompt), logits)
    assert (logits - reference_logits(reference_model(sharded), prompt)).abs().max() < 1e-3


def test_blocks_are_copied_before_anything_is_computed(folder: Folder) -> None:
    runner = load_tiny_runner(folder("llama"))
    (prompt,) = random_prompts(40)
    hidden_states(runner, row(prompt, block_ids=[0, 1, 2]))
    following = row([5, 6], start=40, block_ids=[0, 1, 2])
    expected = hidden_states(runner, following)
    # Block 2 is shared by two sequences: one of them goes on in a copy of it.
    hidden_states(runner, row(prompt, block_ids=[0, 1, 2]))
    moved = Batch((row([5, 6], start=40, block_ids=[0, 1, 9]),), copies=((2, 9),))  # type: ignore[arg-type]
    assert torch.equal(runner.hidden_states(moved), expected)


def test_layers_are_announced_when_their_kv_will_not_change_any_more(runner: ModelRunner) -> None:
    first, second = random_prompts(40, 20)
    rows = (row(first, first_block=0, sample=True), row(second, first_block=5, row_id=1))
    num_layers = runner.info.num_layers
    seen: list[torch.Tensor] = []

    def on_layers(num_ready: int) -> None:
        assert num_ready == len(seen) + 1
        seen.append(runner.kv_cache.tensor[:num_ready].clone())

    runner.run(Batch(rows), on_layers)
    assert len(seen) == num_layers
    for num_ready, pool in enumerate(seen, 1):
        assert torch.equal(pool, runner.kv_cache.tensor[:num_ready])
        assert pool[-1].any(), "stored, not about to be"


def test_layers_that_are_not_finite_are_not_announced(folder: Folder) -> None:
    runner = load_tiny_runner(folder("llama"))
    runner.kv_cache.tensor[1, :, 0] = float("nan")  # attended to in layer 1: broken from 2 on
    told: list[int] = []
    (prompt,) = random_prompts(20)
    results = runner.run(Batch((row(prompt, start=16, sample=True),)), told.append)
    assert [sampled.token_id for sampled in results[0]] == [-1]
    assert told == [1, 2]


def test_a_row_that_is_not_finite_is_refused_and_leaves_nothing_behind(folder: Folder) -> None:
    runner = load_tiny_runner(folder("llama"))
    good, bad = random_prompts(20, 20)
    expected = hidden_states(runner, row(good, first_block=4))[-1]
    runner.kv_cache.tensor[:, :, 0] = float("nan")  # as if a bad peer had sent it
    rows = (
        row(bad, start=16, first_block=0, row_id=1, sample=True),
        row(bad, start=16, first_block=0, row_id=2),
        row(good, first_block=4, row_id=3, sample=True),
    )
    results = runner.run(Batch(rows))
    assert [sampled.token_id for sampled in results[1]] == [-1]
    assert [sampled.token_id for sampled in results[2]] == [-1]
    assert results[3][0].token_id >= 0
    assert runner.kv_cache.tensor[:, :, 1:].isfinite().all()
    again = hidden_states(runner, row(good, first_block=4))[-1]
    assert torch.equal(again, expected)
