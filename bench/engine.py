"""The engine on this machine's CPU, next to what the machine can do.

Measures, interleaved so that a noisy machine hits all of it alike: the GEMM rate, the read
bandwidth, prefill of 512 tokens and decode at batch 1 and 8 of a model of 0.5B parameters with
random weights. Prints the ratio of each to its limit:

    prefill   its multiplications (attention: the causal half) at the GEMM rate / measured time
    decode    its weights and KV read once at the read bandwidth              / measured time

On a processor whose kernels no padding makes batch-invariant, that half of the table is missing.

    python -m bench.engine [--dtype bfloat16] [--rounds 15] [--threads 2] [--json FILE]
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from baton.engine.batch import Batch, SampleRequest, ScheduledRow
from baton.engine.huge_pages import use_huge_pages
from baton.engine.kv_cache import dtype_name
from baton.engine.layers.linear import Linear
from baton.engine.loader import load_runner
from baton.engine.runner import ModelRunner
from baton.engine.runner_config import RunnerConfig
from baton.engine.sampler import Sampler
from baton.kvtransfer.memory import keep_freed_memory
from baton.types import BlockId, SamplingParams

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 896, 24, 14, 2, 64, 4864, 151_936
PREFILL_LEN = 512
LAYER_PARAMS = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * MLP
BLOCK_SIZE = 16
MAX_LEN = 1040
BLOCKS_PER_ROW = MAX_LEN // BLOCK_SIZE
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, seed=1)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def prefill_flops(num_tokens: int) -> float:
    """Multiplications and additions of a prefill that samples one token."""
    attention = 2 * 2 * HEADS * HEAD_DIM * num_tokens * (num_tokens + 1) / 2
    return LAYERS * (2.0 * LAYER_PARAMS * num_tokens + attention) + 2 * HIDDEN * VOCAB


def decode_elements(batch_size: int, context_len: int) -> float:
    """Weights and KV that a decode step reads."""
    kv = batch_size * context_len * LAYERS * 2 * KV_HEADS * HEAD_DIM
    return LAYERS * LAYER_PARAMS + HIDDEN * VOCAB + kv


@dataclass(slots=True)
class Timings:
    """Seconds of one thing, round by round."""

    name: str
    call: Callable[[], object]
    calls_per_round: int
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        best = float("inf")
        for _ in range(self.calls_per_round):
            started = time.perf_counter()
            self.call()
            best = min(best, time.perf_counter() - started)
        self.seconds.append(best)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def limits(dtype: torch.dtype) -> dict[str, tuple[Timings, float]]:
    """name → (timings, work per call): FLOPs of a GEMM with packed weights, bytes of a sum."""
    x = torch.randn(PREFILL_LEN, HIDDEN).to(dtype)
    linear = Linear(torch.randn(MLP, HIDDEN).to(dtype))
    numbers, in_huge_pages = torch.ones(2, 1 << 27).unbind()  # 512 MiB of float32 each
    use_huge_pages(in_huge_pages.data_ptr(), in_huge_pages.nbytes)
    return {
        "gemm": (Timings("gemm", lambda: linear(x), 8), 2.0 * PREFILL_LEN * HIDDEN * MLP),
        "read": (Timings("read", numbers.sum, 3), numbers.numel() * 4.0),
        "read huge": (Timings("read huge", in_huge_pages.sum, 3), numbers.numel() * 4.0),
    }


def row(index: int, start: int, num_tokens: int, params: SamplingParams) -> ScheduledRow:
    blocks = [BlockId(index * BLOCKS_PER_ROW + i) for i in range(BLOCKS_PER_ROW)]
    ids = [(index * 7919 + 31 * i) % VOCAB for i in range(num_tokens)]
    sample = SampleRequest(0, index, start + num_tokens, params, ids, ())
    return ScheduledRow(index, ids, start, blocks, (sample,))


def prefill(params: SamplingParams = GREEDY) -> Batch:
    return Batch((row(0, 0, PREFILL_LEN, params),))


def decode(batch_size: int, context_len: int, params: SamplingParams = GREEDY) -> Batch:
    return Batch(tuple(row(i, context_len, 1, params) for i in range(batch_size)))


@dataclass(frozen=True, slots=True)
class Step:
    """A step to measure. `work`: FLOPs against the GEMM rate, or bytes against the bandwidth."""

    name: str
    batch: Batch
    work: float
    limits: tuple[str, ...]
    calls_per_round: int = 5


def steps(dtype: torch.dtype) -> tuple[Step, ...]:
    reads = ("read", "read huge")
    sizes = ((1, 128), (8, 128), (8, 1000))
    return (
        Step("prefill 512", prefill(), prefill_flops(PREFILL_LEN), ("gemm",), 1),
        *(
            Step(
                f"decode {batch_size} @ {length}",
                decode(batch_size, length),
                dtype.itemsize * decode_elements(batch_size, length),
                reads,
            )
            for batch_size, length in sizes
        ),
    )


@contextmanager
def engine(dtype: torch.dtype, *, batch_invariant: bool | None) -> Iterator[ModelRunner]:
    """Of random weights. `batch_invariant` None = if this processor can."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        token_bytes = LAYERS * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
        runner = load_runner(
            RunnerConfig(
                folder,
                load_format="dummy",
                block_size=BLOCK_SIZE,
                max_model_len=MAX_LEN,
                dtype=dtype_name(dtype),
                max_num_seqs=8,
                kv_cache_memory_bytes=8 * BLOCKS_PER_ROW * BLOCK_SIZE * token_bytes,
                batch_invariant=batch_invariant,
            )
        )
    yield runner
    runner.close()


def sampling(params: SamplingParams, dtype: torch.dtype) -> Callable[[], object]:
    sampler = Sampler(())
    logits = torch.randn(8, VOCAB).to(dtype)
    requests = [r.samples for r in decode(8, 128, params).rows]
    return lambda: sampler.sample(logits, requests)


def measure(rounds: int, dtype: torch.dtype) -> tuple[dict[str, Timings], dict[str, float]]:
    """(every timing by name, work per call of the limits)."""
    machine = limits(dtype)
    timings = {name: timing for name, (timing, _) in machine.items()}
    with (
        engine(dtype, batch_invariant=False) as plain,
        engine(dtype, batch_invariant=None) as invariant,
    ):
        runners = [("", plain)]
        if invariant.info.batch_invariant:
            runners.append((" invariant", invariant))
        for suffix, runner in runners:
            for step in steps(dtype):

                def call(runner: ModelRunner = runner, batch: Batch = step.batch) -> object:
                    return runner.run(batch)

                name = step.name + suffix
                timings[name] = Timings(name, call, step.calls_per_round)
        timings["sampling greedy"] = Timings("sampling greedy", sampling(GREEDY, dtype), 5)
        timings["sampling top_p"] = Timings("sampling top_p", sampling(DRAWN, dtype), 5)
        gc.collect()
        for timing in timings.values():
            timing.call()
        for _ in tqdm(range(rounds), desc="Rounds"):
            for timing in timings.values():
                timing.measure()
    return timings, {name: work for name, (_, work) in machine.items()}


def report(
    timings: dict[str, Timings], work: dict[str, float], dtype: torch.dtype
) -> dict[str, float]:
    """Prints the table; returns the figures by name."""
    figures = {name: work[name] / timings[name].best / 1e9 for name in work}
    print(f"\n{torch.get_num_threads()} threads; best of all rounds (median in brackets)\n")
    print(f"GEMM rate, {dtype_name(dtype):17} {figures['gemm']:6.0f} GFLOP/s")
    print(f"read bandwidth, 4 KiB pages  {figures['read']:6.1f} GB/s")
    print(f"read bandwidth, huge pages   {figures['read huge']:6.1f} GB/s\n")
    print("| step | measured | limit | limit / measured | median of the rounds |")
    print("| --- | --- | --- | --- | --- |")
    suffixes = [s for s in ("", " invariant") if f"decode 8 @ 128{s}" in timings]
    for step in steps(dtype):
        for limit in step.limits:
            share = step.work / work[limit]  # calls of the limit that do the same work
            floor = share * timings[limit].best
            for timing in (timings[step.name + suffix] for suffix in suffixes):
                rounds = zip(timings[limit].seconds, timing.seconds, strict=True)
                per_round = statistics.median(share * low / high for low, high in rounds)
                figures[f"{timing.name} / {limit}"] = floor / timing.best
                print(
                    f"| {timing.name} | {timing.best * 1e3:.1f} ms ({timing.median * 1e3:.1f}) | "
                    f"{limit}: {floor * 1e3:.1f} ms | {floor / timing.best:.2f} | {per_round:.2f} |"
                )
    print()
    if len(suffixes) == 1:
        print("this processor's kernels are not batch-invariant in this dtype")
    for step in steps(dtype) if len(suffixes) == 2 else ():
        pair = timings[f"{step.name} invariant"], timings[step.name]
        rounds = zip(pair[0].seconds, pair[1].seconds, strict=True)
        cost = statistics.median(high / low - 1 for high, low in rounds)
        figures[f"{step.name} invariance cost"] = cost
        print(f"batch invariance costs {cost:+.1%} in {step.name}")
    for name in ("sampling greedy", "sampling top_p"):
        share = timings[name].best / timings["decode 8 @ 128"].best
        figures[f"{name} share"] = share
        print(f"{name}: {timings[name].best * 1e3:.2f} ms, {share:.1%} of a decode step at batch 8")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="all cores if absent")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()  # as a worker does
    dtype: torch.dtype = getattr(torch, args.dtype)
    figures = report(*measure(args.rounds, dtype), dtype)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
