"""What an engine does on CUDA, here on CPU: the Triton kernels (interpreted) and the replayed
decode steps give the tokens that the CPU path gives. Capturing needs a device: see bench/gpu.py."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baton.engine.batch import Batch
from baton.engine.graphs import DecodeGraphs, graph_sizes
from baton.engine.layers import attention
from baton.engine.layers.attention import KernelBackend
from baton.engine.layers.linear import GatedLinear, Linear
from baton.engine.models import decoder
from baton.engine.runner import ModelRunner
from baton.engine.sampler import Sampler
from baton.engine.warmup import largest_batch, num_warmup_blocks
from baton.kernels.kv_store_triton import kv_store_triton
from baton.kernels.paged_decode_triton import paged_decode_triton
from baton.kernels.paged_prefill_triton import paged_prefill_triton
from baton.kernels.rms_norm_triton import rms_norm_triton
from baton.kernels.rope_triton import rope_triton
from baton.types import SamplingParams
from tests.engine.rows import row
from tests.engine.tiny_models import (
    generate,
    load_tiny_runner,
    make_core,
    random_prompts,
    save_tiny_model,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=4, ignore_eos=True)
FAMILIES = {
    "llama3-rope": GREEDY,
    "mistral-window": SEEDED,
    "qwen2": GREEDY,
    "qwen3": SEEDED,
}
# An interpreted program takes milliseconds: one layer, few heads.
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
MAX_LEN = 128
Replay = tuple[Callable[[], object], Tensor]


class Recorder:
    """Captures as CUDA does: what ran once runs again on the same addresses, result included."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        output = function()
        return partial(self._replay, function, output), output

    def _replay(self, function: Callable[[], Tensor], output: Tensor) -> None:
        self.num_replays += 1
        output.copy_(function())


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on CPU go through the Triton kernels."""
    monkeypatch.setattr(attention, "kv_store", kv_store_triton)
    monkeypatch.setattr(attention, "paged_decode", paged_decode_triton)
    monkeypatch.setattr(attention, "paged_prefill", paged_prefill_triton)
    monkeypatch.setattr(decoder, "rms_norm", rms_norm_triton)
    monkeypatch.setattr(decoder, "rope", rope_triton)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)


def on_kernels(runner: ModelRunner, graphs: DecodeGraphs | None = None) -> ModelRunner:
    """The same model and pool, as they would run on CUDA."""
    backend = KernelBackend(runner._model.config, runner.kv_cache)
    sampler = Sampler(runner.info.eos_token_ids)
    return ModelRunner(
        runner.info, runner._model, runner.kv_cache, backend, sampler, runner.grammars, graphs
    )


def make_graphs(runner: ModelRunner, sizes: list[int], recorder: Recorder) -> DecodeGraphs:
    with torch.inference_mode():
        return DecodeGraphs(
            runner._model,
            KernelBackend(runner._model.config, runner.kv_cache),
            runner.kv_cache.block_size,
            MAX_LEN,
            sizes,
            torch.device("cpu"),
            recorder,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_and_graphs_give_the_tokens_of_the_cpu_path(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = random_prompts(3, 26), FAMILIES[family]
    limits = {"max_num_batched_tokens": 24, "max_num_seqs": 4}  # chunks, decodes beside them
    runner = load_tiny_runner(save_tiny_model(tmp_path, family, **SMALL), max_model_len=MAX_LEN)
    expected = generate(make_core(runner, **limits), prompts, params)
    use_kernels(monkeypatch)
    recorder = Recorder()
    graphed = on_kernels(runner, make_graphs(runner, [1, 2], recorder))
    assert generate(make_core(graphed, **limits), prompts, params) == expected
    assert recorder.num_replays >= 2
    runner.close()


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_merged_mlp_computes_what_two_products_do(has_bias: bool) -> None:
    torch.manual_seed(0)
    weights = torch.randn(2, 48, 32).half()  # float32 would be packed, and packed is not merged
    biases = torch.randn(2, 48).half() if has_bias else (None, None)
    x = torch.randn(5, 32).half()
    apart, merged = (
        GatedLinear(*map(Linear, weights, biases), is_merged=is_merged)
        for is_merged in (False, True)
    )
    assert (len(apart.linears), len(merged.linears)) == (2, 1)
    assert torch.allclose(merged(x), apart(x), rtol=1e-2, atol=1e-2)


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[ModelRunner]:
    folder = save_tiny_model(tmp_path, "llama", **SMALL)
    runner = load_tiny_runner(folder, max_model_len=MAX_LEN)
    yield runner
    runner.close()


@pytest.mark.usefixtures("kernels")
def test_empty_rows_of_a_graph_write_nothing(llama: ModelRunner) -> None:
    graphs = make_graphs(llama, [4], Recorder())
    runner = on_kernels(llama, graphs)
    llama.kv_cache.tensor.zero_()  # of what capturing may have written
    (prompt,) = random_prompts(20)
    runner.run(Batch((row(prompt, first_block=3),)))
    before = llama.kv_cache.tensor.clone()
    runner.run(Batch((row([5], 20, first_block=3, sample=True),)))
    changed = (llama.kv_cache.tensor != before).flatten(4).any(4).any(0).any(0)
    assert changed.nonzero().tolist() == [[4, 4]]  # token 20 is the fifth of the second block


def test_a_graph_follows_rows_whose_blocks_change(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that move up, grow, or come back with other blocks."""
    monkeypatch.setattr(attention, "kv_store", kv_store_triton)  # takes rows that are empty
    recorder = Recorder()
    graphed, eager = on_kernels(llama, make_graphs(llama, [1, 2, 3], recorder)), on_kernels(llama)
    prompts = random_prompts(15, 31, 47)
    for index, prompt in enumerate(prompts):
        eager.run(Batch((row(prompt, first_block=8 * index),)))
    third_elsewhere = [32, 33, 18, 34]
    eager.run(Batch((), ((16, 32), (17, 33))))

    def decode(index: int, start: int, block_ids: list[int] | None = None) -> object:
        return row(
            [9], start, first_block=8 * index, block_ids=block_ids, row_id=index, sample=True
        )

    for rows in (
        (decode(0, 15), decode(1, 31), decode(2, 47)),
        (decode(0, 16), decode(2, 48)),
        (decode(2, 49), decode(1, 32)),
        (decode(2, 50, third_elsewhere),),
    ):
        kv = llama.kv_cache.tensor.clone()
        expected = eager.run(Batch(rows))  # type: ignore[arg-type]
        llama.kv_cache.tensor.copy_(kv)
        assert graphed.run(Batch(rows)) == expected  # type: ignore[arg-type]
    assert recorder.num_replays == 4


def test_a_step_larger_than_every_graph_runs_without(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "kv_store", kv_store_triton)
    graphs = make_graphs(llama, [1, 2], Recorder())
    assert graphs.run([row([5], 0, first_block=i) for i in range(3)]) is None


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 8, 9, 64, 100, 4096])
def test_graph_sizes_hold_every_step_and_waste_little(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, 512)
    for num_rows in range(1, sizes[-1] + 1):
        size = next(size for size in sizes if size >= num_rows)
        assert size - num_rows < 8
        assert size < 2 * num_rows or size <= 8


@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(512, 64), (64, 64), (2048, 3), (100, 1)])
def test_the_largest_batch_fills_its_limits(num_tokens: int, num_seqs: int) -> None:
    batch = largest_batch(num_tokens, num_seqs, MAX_LEN, block_size=16)
    blocks = [block for r in batch.rows for block in r.block_ids]
    assert len(set(blocks)) == len(blocks)
    assert max(blocks) < num_warmup_blocks(num_tokens, num_seqs, 16)
    assert len(batch.rows) <= num_seqs
    assert batch.num_tokens == min(num_tokens, num_seqs * MAX_LEN)
    assert all(len(r.token_ids) <= MAX_LEN and r.samples for r in batch.rows)


def test_the_largest_batch_runs(llama: ModelRunner) -> None:
    results = on_kernels(llama).run(largest_batch(64, 8, MAX_LEN, 16))
    assert len(results) == 8
    assert all(sampled[0].token_id >= 0 for sampled in results.values())
