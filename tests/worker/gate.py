"""The token-exact gate: engines to hand over between, and what one engine gives by itself."""

import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from baton.engine.commands import AddLocal
from baton.engine.events import LegFailed, LegTokens
from baton.engine.runner import ModelRunner
from baton.kvtransfer.local import LocalNetwork
from baton.types import (
    LegId,
    Logprobs,
    RepetitionDetection,
    Request,
    SamplingParams,
    StructuredKind,
    StructuredOutput,
)
from tests.engine.tiny_models import load_tiny_runner, make_core, random_prompts, save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.worker.fleet import Client, LocalWorker, start_worker

CHUNK_TOKENS = 32  # so that most prompts take several steps
EOS = (2,)
PROMPT_LEN = 96  # a multiple of both block sizes
GREEDY = {"temperature": 0.0, "seed": 0, "max_tokens": 10, "ignore_eos": True}
SEEDED = {"temperature": 1.0, "seed": 5, "max_tokens": 10, "ignore_eos": True}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"enum": [1, True, None]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "two choices": {**SEEDED, "n": 2},
    "four choices": {**SEEDED, "n": 4, "top_p": 0.9},
    "truncated": {**SEEDED, "top_k": 20, "min_p": 0.01},
    "penalties": {**SEEDED, "frequency_penalty": 0.8, "repetition_penalty": 1.4, "n": 2},
    "logprobs": {**SEEDED, "logprobs": 4, "presence_penalty": 0.5},
    "biased": {**SEEDED, "logit_bias": dict.fromkeys(range(0, 250, 2), -100) | {7: 4.5}, "n": 2},
    "few allowed": {
        **SEEDED,
        "allowed_token_ids": range(40, 60),
        "n": 2,
        "logprobs": 3,
        "logprob_token_ids": (41, 7),
    },
    "bad words": {
        **SEEDED,
        "temperature": 0.3,
        "allowed_token_ids": range(40, 43),
        "bad_words_token_ids": [(40, 41), (42, 42), (41, 40, 41)],
        "n": 2,
    },
    "repetition": {
        **SEEDED,
        "allowed_token_ids": range(40, 43),
        "repetition_detection": RepetitionDetection(3, 2, 2),
        "max_tokens": 60,
        "n": 2,
    },
    "structured": {
        **SEEDED,
        "structured_outputs": StructuredOutput(StructuredKind.JSON_SCHEMA, SCHEMA, False),
        "logit_bias": {37: 4.0},  # a quotation mark
        "frequency_penalty": 0.2,
        "max_tokens": 60,
        "n": 2,
    },
    "may end early": {**SEEDED, "ignore_eos": False, "min_tokens": 2, "max_tokens": 30},
}
BLOCK_SIZES = [(16, 16), (16, 32), (32, 16)]


@dataclass(frozen=True)
class Runners:
    """Of one checkpoint: one KV pool per worker."""

    p: dict[int, ModelRunner]  # by block size
    d: dict[int, ModelRunner]
    second: ModelRunner  # block size 16
    oracle: ModelRunner


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runners]:
    torch.set_num_threads(1)
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen3")

    def load(block_size: int) -> ModelRunner:
        return load_tiny_runner(
            folder,
            tiny_tokenizer,
            block_size=block_size,
            dtype="float32",
            batch_invariant=True,
        )

    made = Runners({16: load(16), 32: load(32)}, {16: load(16), 32: load(32)}, load(16), load(16))
    yield made
    for runner in (*made.p.values(), *made.d.values(), made.second, made.oracle):
        runner.close()


Expected = tuple[dict[int, list[int]], dict[int, list[Logprobs]]]
Oracle = Callable[[Request], Expected]


def on_the_wire(logprobs: dict[int, list[Logprobs]]) -> dict[int, list[Logprobs]]:
    """With 32 bits, as they are in messages and in the end frame."""

    def f32(value: float) -> float:
        return float(np.float32(value))

    def pairs(entries: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        return tuple((token_id, f32(value)) for token_id, value in entries)

    return {
        choice: [
            Logprobs(f32(one.logprob), one.rank, pairs(one.top), pairs(one.asked))
            for one in entries
        ]
        for choice, entries in logprobs.items()
    }


@pytest.fixture(scope="module")
def oracle(runners: Runners) -> Oracle:
    """The same request alone in one engine, nothing cached, the whole prompt in one step."""

    def generate(request: Request) -> Expected:
        core = make_core(runners.oracle, enable_prefix_caching=False, eos_token_ids=EOS)
        leg = LegId(request.request_id, 0)
        core.apply(AddLocal(leg, request))
        token_ids: dict[int, list[int]] = {c: [] for c in range(request.sampling.n)}
        logprobs: dict[int, list[Logprobs]] = {c: [] for c in range(request.sampling.n)}
        while core.has_work:
            output = core.step()
            for event in output.events if output is not None else ():
                assert not isinstance(event, LegFailed), event
                if isinstance(event, LegTokens):
                    token_ids[event.chunk.choice] += event.chunk.token_ids
                    logprobs[event.chunk.choice] += event.chunk.logprobs
        return token_ids, on_the_wire(logprobs)

    return generate


@asynccontextmanager
async def workers(*made: Coroutine[Any, Any, LocalWorker]) -> AsyncIterator[list[LocalWorker]]:
    """Checked for leaks at the end."""
    started = [await one for one in made]
    try:
        yield started
        for worker in started:
            if worker.is_open:
                await worker.assert_clean()
    finally:
        for worker in started:
            await worker.close()


@asynccontextmanager
async def pair(
    runners: Runners, block_sizes: tuple[int, int] = (16, 16)
) -> AsyncIterator[tuple[LocalWorker, LocalWorker]]:
    """P and D."""
    network = LocalNetwork()
    p, d = runners.p[block_sizes[0]], runners.d[block_sizes[1]]
    async with workers(worker(network, "p", p), worker(network, "d", d)) as (first, second):
        yield first, second


def worker(
    network: LocalNetwork, name: str, runner: ModelRunner, **options: Any
) -> Coroutine[Any, Any, LocalWorker]:
    options = {"max_num_batched_tokens": CHUNK_TOKENS, "eos_token_ids": EOS, **options}
    options.setdefault("max_num_seqs", 16)
    return start_worker(network, name, runner, **options)


def prompt(length: int, seed: int) -> list[int]:
    return random_prompts(length, seed=seed)[0]


async def cache(worker: LocalWorker, client: Client, tokens: list[int]) -> None:
    """Let the worker's prefix cache hold these."""
    if tokens:
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=1)
        await client.local(worker, client.request(tokens, sampling))
