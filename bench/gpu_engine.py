"""Prefill and decode of a model of Llama-3-8B's shape, against the device's limits. Part of
bench.gpu.

    decode   (weights + KV of the contexts) / rate of a device copy
    prefill  FLOPs of weights and attention / rate of a bf16 product
"""

import copy
import json
import tempfile
from pathlib import Path

import torch

from baton.engine.batch import Batch, SampleRequest, ScheduledRow
from baton.engine.loader import load_runner
from baton.engine.runner import ModelRunner
from baton.engine.runner_config import RunnerConfig
from baton.types import BlockId, SamplingParams
from bench.gpu_report import Limits, Report, wall_seconds

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
BLOCK_SIZE, MAX_NUM_SEQS, POOL_BYTES = 16, 64, 36 << 30
KV_BYTES = 32 * 2 * 8 * 128 * 2  # of a token
# What every token is multiplied with; the embedding is only looked up.
LAYER_WEIGHTS = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
WEIGHTS, HEAD = 32 * LAYER_WEIGHTS, 128256 * 4096
GREEDY = SamplingParams(temperature=0.0)
CUT = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
DECODES = [(1, 1024), (8, 1024), (8, 8000), (32, 2048), (64, 1024), (64, 4096)]
PREFILLS = [(512, 0), (2048, 0), (8192, 0), (2048, 6000)]  # (new tokens, cached tokens)


def load(folder: Path, pool_bytes: int) -> ModelRunner:
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return load_runner(
        RunnerConfig(
            str(folder),
            load_format="dummy",
            device="cuda",
            block_size=BLOCK_SIZE,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=8192,
            kv_cache_memory_bytes=pool_bytes,
            show_progress=False,
        )
    )


def make_row(index: int, start: int, length: int, params: SamplingParams) -> ScheduledRow:
    width = -(-(start + length) // BLOCK_SIZE)
    block_ids = [BlockId(index * width + i) for i in range(width)]
    sample = SampleRequest(0, 0, start + length, params, (0,), ())
    return ScheduledRow(index, [1 + index] * length, start, block_ids, (sample,))


def decode(runner: ModelRunner, num_seqs: int, context_len: int, params: SamplingParams) -> float:
    """Seconds of a step."""
    rows = tuple(make_row(i, context_len - 1, 1, params) for i in range(num_seqs))
    return wall_seconds(lambda: runner.run(Batch(rows)))


def run_decodes(runner: ModelRunner, limits: Limits, report: Report) -> None:
    eager = copy.copy(runner)
    eager._graphs = None
    report.line(
        "| decode | floor ms | graphs ms | of the limit | eager ms | graphs, top-k and top-p ms |"
    )
    report.line("|---|---|---|---|---|---|")
    for num_seqs, context_len in DECODES:
        name = f"{num_seqs} x {context_len}"
        with report.attempt(f"decode {name}"):
            moved = 2 * (WEIGHTS + HEAD) + num_seqs * context_len * KV_BYTES
            floor = moved / limits.copy_bytes_s
            graphed = decode(runner, num_seqs, context_len, GREEDY)
            plain = decode(eager, num_seqs, context_len, GREEDY)
            cut = decode(runner, num_seqs, context_len, CUT)
            report.line(
                f"| {name} | {floor * 1e3:.2f} | {graphed * 1e3:.2f} | {floor / graphed:.2f} "
                f"| {plain * 1e3:.2f} | {cut * 1e3:.2f} |"
            )


def run_prefills(runner: ModelRunner, limits: Limits, report: Report) -> None:
    report.line("| prefill | floor ms | ms | of the limit | tokens/s |")
    report.line("|---|---|---|---|---|")
    for length, start in PREFILLS:
        name = f"{length} after {start}"
        with report.attempt(f"prefill {name}"):
            pairs = length * start + length * (length + 1) / 2
            flops = 2 * WEIGHTS * length + 2 * HEAD + 4 * pairs * 32 * 128 * 32
            floor = flops / limits.matmul_flops_s
            row = make_row(0, start, length, GREEDY)
            took = wall_seconds(lambda row=row: runner.run(Batch((row,))), repeats=5)  # type: ignore[misc]
            report.line(
                f"| {name} | {floor * 1e3:.1f} | {took * 1e3:.1f} | {floor / took:.2f} "
                f"| {length / took:.0f} |"
            )


def run(limits: Limits, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runner = load(Path(folder), POOL_BYTES)
    report.line(f"loaded: {torch.cuda.memory_allocated() / 2**30:.1f} GiB with the KV pool")
    run_decodes(runner, limits, report)
    run_prefills(runner, limits, report)
    runner.close()
