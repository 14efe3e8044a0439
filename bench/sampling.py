"""Cost of sampling on CPU: rows of logits like a language model's, and flat ones (random weights).

python bench/sampling.py --rows 8 --vocab 151936
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from baton.engine.batch import SampleRequest
from baton.engine.sampler import Sampler
from baton.types import SamplingParams

SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-k 50, top-p 0.9": SamplingParams(top_k=50, top_p=0.9),
    "top-p 0.9": SamplingParams(top_p=0.9),
    "min-p 0.05": SamplingParams(min_p=0.05),
    "none": SamplingParams(),
    "greedy, penalties": SamplingParams(temperature=0.0, repetition_penalty=1.1),
    "greedy, 5 logprobs": SamplingParams(temperature=0.0, logprobs=5),
}


def zipf(num_rows: int, vocab_size: int) -> Tensor:
    """The r-th likeliest token has about r**-2 of the likeliest one's probability."""
    ranks = torch.stack([torch.randperm(vocab_size) for _ in range(num_rows)]) + 1
    return 18 - 2 * ranks.log() + torch.randn(num_rows, vocab_size) * 0.5


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of `repeats` runs, in time of this thread."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sampler = Sampler([])
    prompt, output = tuple(range(1000)), list(range(500))
    tables = {
        "zipf": zipf(args.rows, args.vocab),
        "flat": torch.randn(args.rows, args.vocab) * 0.6,
    }
    print(f"{args.rows} rows of {args.vocab} logits, one thread, milliseconds")
    for name, params in SETTINGS.items():
        request = SampleRequest(0, 0, len(prompt) + len(output), params, prompt, output)
        groups = [(replace(request, seed=row),) for row in range(args.rows)]
        cells = []
        for label, logits in tables.items():
            cost = milliseconds(lambda x=logits, g=groups: sampler.sample(x, g), args.repeats)
            cells.append(f"{label} {cost:7.2f}")
        print(f"{name:22s}", *cells, sep="   ")


if __name__ == "__main__":
    main()
