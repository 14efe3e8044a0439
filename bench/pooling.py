"""Embeddings on CPU: our packed steps against transformers' padded batches, same weights and texts.

python -m bench.pooling --layers 6 --hidden 384
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from baton.engine.pooling_core import AddJob, PoolingCore, PoolingRow
from baton.engine.pooling_loader import load_pooling_runner
from baton.engine.runner_config import RunnerConfig
from baton.pooling import PoolingInput

VOCAB_SIZE = 30_522
Texts = Sequence[list[int]]


def save_model(folder: Path, layers: int, hidden: int) -> None:
    """A BERT of random weights, with MiniLM's shape by default."""
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden,
    )
    transformers.BertModel(config).save_pretrained(folder)


def make_texts(num_texts: int, shortest: int, longest: int) -> Texts:
    draw = random.Random(0)
    return [
        [draw.randrange(1000, VOCAB_SIZE) for _ in range(draw.randint(shortest, longest))]
        for _ in range(num_texts)
    ]


def packed(folder: Path, texts: Texts, max_tokens: int) -> Callable[[], object]:
    runner = load_pooling_runner(RunnerConfig(str(folder), dtype="float32", show_progress=False))
    core = PoolingCore(runner, max_tokens, max_num_seqs=256)

    def run() -> None:
        core.apply(AddJob(0, tuple(PoolingRow(PoolingInput(tuple(ids))) for ids in texts)))
        while core.step() is not None:
            pass

    return run


def padded(folder: Path, texts: Texts, batch: int, *, by_length: bool) -> Callable[[], object]:
    model: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(texts, key=len) if by_length else list(texts)

    def run() -> None:
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                width = max(map(len, rows))
                ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
                states = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
                torch.nn.functional.normalize(states, dim=-1)

    return run


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The fastest of `repeats` rounds, each of which has every run once; CPU time of this process,
    so that what else the machine does counts as little as it can."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=8)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    texts = make_texts(args.texts, args.shortest, args.longest)
    num_tokens = sum(map(len, texts))
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_model(folder, args.layers, args.hidden)
        runs = {f"packed, steps of {size}": packed(folder, texts, size) for size in (512, 2048)}
        for batch in (1, 32):
            runs[f"transformers, batches of {batch}"] = padded(
                folder, texts, batch, by_length=False
            )
        runs["transformers, batches of 32, sorted"] = padded(folder, texts, 32, by_length=True)
        times = seconds(runs, args.repeats)
    print(f"{len(texts)} texts, {num_tokens} tokens, {torch.get_num_threads()} threads")
    first = next(iter(times.values()))
    for name, took_s in times.items():
        print(f"{name:40} {num_tokens / took_s:8.0f} tok/CPU-s  {took_s / first:.2f}")


if __name__ == "__main__":
    main()
