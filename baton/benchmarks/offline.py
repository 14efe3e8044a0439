"""`baton bench latency` and `throughput`: what `LLM` does, without a client in between."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from baton.benchmarks.datasets import Sample, Words, ordinary_text
from baton.llm import LLM
from baton.types import SamplingParams

_PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class Latency:
    """vLLM's names; lengths in tokens."""

    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    n: int = 1
    num_iters_warmup: int = 10
    num_iters: int = 30
    use_tqdm: bool = True


class LLMTexts:
    """An LLM's tokenizer, as `baton.benchmarks.datasets` takes it."""

    def __init__(self, llm: LLM) -> None:
        self._tokenizer = llm.get_tokenizer()

    async def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    async def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)


def measure_latency(llm: LLM, options: Latency) -> dict[str, Any]:
    """How long one batch takes, from the call to its end; every iteration has prompts of its own,
    so no prefix is cached.

    Raises:
        BatonError: as `LLM.generate`.
    """

    words = Words(llm.get_tokenizer().encode(ordinary_text(), add_special_tokens=False))
    rng = random.Random(0)
    params = SamplingParams(
        n=options.n, temperature=1.0, ignore_eos=True, max_tokens=options.output_len
    )

    def once() -> float:
        prompts = [words.draw(rng, options.input_len) for _ in range(options.batch_size)]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    rounds = tqdm(range(options.num_iters_warmup + options.num_iters), disable=not options.use_tqdm)
    latencies = [once() for _ in rounds][options.num_iters_warmup :]
    return {
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {
            str(percentile): float(np.percentile(latencies, percentile))
            for percentile in _PERCENTILES
        },
    }


def measure_throughput(llm: LLM, samples: Sequence[Sample], *, use_tqdm: bool) -> dict[str, Any]:
    """All samples at once; every output has its full length.

    Raises:
        BatonError: as `LLM.generate`.
    """
    params = [
        SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=sample.output_len)
        for sample in samples
    ]
    began = time.perf_counter()
    outputs = llm.generate([sample.prompt for sample in samples], params, use_tqdm=use_tqdm)
    elapsed = time.perf_counter() - began
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": (num_input + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
    }
