"""Batch invariance, bit for bit: a token's result depends on its sequence and on nothing else."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baton.engine.device import multiplies
from baton.engine.invariance import pad_linears, probe_invariance
from baton.engine.layers import packed_weight
from baton.engine.layers.linear import Linear
from baton.engine.model_config import load_model_config
from baton.engine.runner import ModelRunner
from baton.errors import InvalidRequest
from baton.kernels import paged_attention_native
from baton.kernels.paged_attention_cpu import CpuAttention
from baton.kernels.paged_rows import PagedRow
from baton.types import SamplingParams
from tests.engine.rows import chunked, hidden_states, row
from tests.engine.tiny_models import (
    generate,
    load_tiny_runner,
    make_core,
    random_prompts,
    save_tiny_model,
)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="the mode needs oneDNN",
)

MAX_LEN = 1100  # more than two tiles of keys
# Group sizes 2, 1 and 7; head dimensions 16, 32 and 64; a window; odd widths.
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "one-head-per-kv-head": ("qwen3", {"num_key_value_heads": 4}),
    "seven-heads-per-kv-head": (
        "qwen2",
        {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "window": ("mistral-window", {"sliding_window": 600, "intermediate_size": 100}),
}
DTYPES = (
    "float32",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(
            not multiplies(torch.bfloat16), reason="no padding helps emulated arithmetic"
        ),
    ),
)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(shape: str) -> Path:
        if shape not in made:
            family, overrides = SHAPES[shape]
            made[shape] = save_tiny_model(
                tmp_path_factory.mktemp(shape),
                family,
                num_hidden_layers=2,
                max_position_embeddings=MAX_LEN,
                **overrides,
            )
        return made[shape]

    return get


@pytest.fixture(params=SHAPES)
def runner(
    request: pytest.FixtureRequest, folder: Callable[[str], Path], dtype: str
) -> Iterator[ModelRunner]:
    runner = load_tiny_runner(folder(request.param), dtype=dtype, batch_invariant=True)
    assert runner.info.batch_invariant
    yield runner
    runner.close()


def differing(got: Tensor, expected: Tensor) -> list[int]:
    """Rows that are not equal bit for bit."""
    assert got.shape == expected.shape
    return (got != expected).any(dim=-1).nonzero().flatten().tolist()


BLOCKS = list(range(80))


def test_chunks_and_decode_give_the_bits_of_one_prefill(runner: ModelRunner) -> None:
    (prompt,) = random_prompts(1050)
    whole = hidden_states(runner, row(prompt, block_ids=BLOCKS))
    for sizes in ((512, 512, 26), (1, 63, 65, 383, 1, 2, 3, 532), (7,) * 150):
        parts, start = [], 0
        for size in sizes:
            part = row(prompt[start : start + size], start, block_ids=BLOCKS)
            parts.append(hidden_states(runner, part))
            start += size
        assert differing(torch.cat(parts), whole) == [], sizes


@pytest.mark.parametrize("start", [0, 180, 500])
def test_decode_gives_the_bits_of_prefill(runner: ModelRunner, start: int) -> None:
    (prompt,) = random_prompts(start + 30)
    whole = hidden_states(runner, row(prompt, block_ids=BLOCKS))
    singles = [
        hidden_states(runner, row([prompt[at]], at, block_ids=BLOCKS))
        for at in range(start, len(prompt))
    ]
    assert differing(torch.cat(singles), whole[start:]) == []


def test_company_does_not_matter(runner: ModelRunner) -> None:
    """The same rows alone, and in one step of up to 512 tokens."""
    lengths = (1, 2, 3, 5, 8, 13, 40, 64, 65, 100, 211)
    prompts = random_prompts(*lengths)
    alone = [hidden_states(runner, row(prompt, first_block=50)) for prompt in prompts]
    rows, first_block = [], 0
    for index, prompt in enumerate(prompts):
        rows.append(row(prompt, first_block=first_block, row_id=index))
        first_block += -(-len(prompt) // 16)
    for count in range(1, len(rows) + 1):
        together = hidden_states(runner, *rows[:count])
        assert differing(together, torch.cat(alone[:count])) == [], lengths[:count]


def test_decodes_of_any_number_give_the_same_bits(runner: ModelRunner) -> None:
    prompts = random_prompts(*range(3, 3 + 24))
    before = [row(p[:-1], first_block=2 * i, row_id=i) for i, p in enumerate(prompts)]
    hidden_states(runner, *before)
    last = [row(p[-1:], len(p) - 1, first_block=2 * i) for i, p in enumerate(prompts)]
    together = hidden_states(runner, *last)
    for count in (1, 2, 3, 5, 8, 17):
        assert differing(hidden_states(runner, *last[:count]), together[:count]) == []
        assert differing(hidden_states(runner, *last[-count:]), together[-count:]) == []


def test_where_the_blocks_lie_does_not_matter(runner: ModelRunner) -> None:
    (prompt,) = random_prompts(300)
    expected = hidden_states(runner, row(prompt, first_block=0))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    assert differing(hidden_states(runner, row(prompt, block_ids=order)), expected) == []
    at_the_end = list(range(runner.kv_cache.num_blocks - 19, runner.kv_cache.num_blocks))
    assert differing(hidden_states(runner, row(prompt, block_ids=at_the_end)), expected) == []


def test_what_lies_in_other_slots_does_not_matter(runner: ModelRunner) -> None:
    (prompt,) = random_prompts(205)
    parts = chunked(runner, prompt, (200, 1, 1, 1, 1, 1))
    runner.kv_cache.tensor.fill_(1e4)
    assert differing(torch.cat(chunked(runner, prompt, (200, 5))), torch.cat(parts)) == []


def test_the_number_of_threads_does_not_matter(runner: ModelRunner) -> None:
    (prompt,) = random_prompts(130)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.cat(chunked(runner, prompt, (100, 29, 1))))
    finally:
        torch.set_num_threads(threads)
    assert differing(results[1], results[0]) == []
    assert differing(results[2], results[0]) == []


def test_without_our_kernels(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries do it, with padding."""
    monkeypatch.setattr(packed_weight, "_skinny_gemm", None)
    monkeypatch.setattr(paged_attention_native, "_paged_attention", None)
    packed_weight._has_equal_bits.cache_clear()
    try:
        runner = load_tiny_runner(folder("llama"), batch_invariant=True)
    finally:
        packed_weight._has_equal_bits.cache_clear()
    (prompt,) = random_prompts(130)
    whole = hidden_states(runner, row(prompt, block_ids=BLOCKS))
    parts = chunked(runner, prompt, (100, 27, 1, 1, 1))
    assert differing(torch.cat(parts), whole) == []
    runner.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_scheduling_or_prefix_cache(
    folder: Callable[[str], Path], dtype: str, temperature: float
) -> None:
    shared, *tails = random_prompts(70, 1, 9, 30, 45)
    prompts = [shared + tail for tail in tails]
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=40, ignore_eos=True)
    runner = load_tiny_runner(folder("llama"), dtype=dtype, batch_invariant=True)
    alone = [generate(make_core(runner), [prompt], params)[0] for prompt in prompts]
    together = generate(make_core(runner), prompts, params)
    core = make_core(runner, max_num_batched_tokens=24, max_num_seqs=3)
    chunks = generate(core, prompts, params)
    hits = generate(core, prompts, params)
    assert together == chunks == hits == alone


# ── the parts ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(96, 64), (250, 33), (64, 96), (48, 4864), (1152, 896)])
def test_linear_layers_for_every_number_of_rows(shape: tuple[int, int], dtype: str) -> None:
    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    linear = Linear(torch.randn(shape).to(torch_dtype), torch.randn(shape[0]).to(torch_dtype))
    pad_linears([linear], torch_dtype)
    x, other = (torch.randn(512, size).to(torch_dtype) for size in reversed(shape))
    calls: list[Callable[[slice], Tensor]] = [
        lambda rows: linear(x[rows]),
        lambda rows: linear.silu(x[rows]),
        lambda rows: linear.times(x[rows], other[rows]),
        lambda rows: linear.plus(x[rows], other[rows]),
    ]
    for call in calls:
        whole = call(slice(512))
        numbers = range(1, 513) if shape == (96, 64) else (1, 2, 3, 5, 8, 31, 64, 255)
        bad = [n for n in numbers if differing(call(slice(n)), whole[:n])]
        bad += [n for n in numbers[::16] if differing(call(slice(512 - n, 512)), whole[512 - n :])]
        assert bad == []


def test_attention_for_every_number_of_queries(folder: Callable[[str], Path], dtype: str) -> None:
    config = load_model_config(folder("seven-heads-per-kv-head"))
    torch_dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    invariance = probe_invariance(head_dim, torch_dtype)
    attention = CpuAttention(heads, kv_heads, head_dim, torch_dtype, invariance)
    kv_cache = torch.randn(2, 64, 16, kv_heads, head_dim).to(torch_dtype)
    q = torch.randn(512, heads, head_dim).to(torch_dtype)

    def attend(start: int, stop: int) -> Tensor:
        rows = [PagedRow(start, stop - start, range(40))]
        return attention.run(q[start:stop], kv_cache, attention.plan(rows, kv_cache, 0))

    whole = attend(0, 512)
    for stop in range(1, 513):
        assert differing(attend(stop - 1, stop).flatten(1), whole[stop - 1 : stop].flatten(1)) == []
        assert differing(attend(0, stop).flatten(1), whole[:stop].flatten(1)) == []


def test_the_mode_is_refused_where_it_cannot_be_had(folder: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidRequest, match="batch-invariant"):
        load_tiny_runner(folder("llama"), dtype="float16", batch_invariant=True)
    runner = load_tiny_runner(folder("llama"), dtype="float16")
    assert not runner.info.batch_invariant
