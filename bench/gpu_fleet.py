"""A fleet on one GPU, over HTTP: prefill and decode share it, then one worker does both. Part of
bench.gpu.

A model of Llama-3-8B's shape without its vocabulary, random weights. Every prompt is new. TTFT and
TPOT are of one stream at a time (medians), and of `CROWD` streams at once.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import torch

from baton.fleet import Fleet
from bench.gpu_engine import CONFIG
from bench.gpu_report import Limits, Report
from bench.small_fleet import dummy_fleet

VOCAB, NUM_OUTPUTS, CROWD, REPEATS = 2048, 64, 16, 5
PROMPT_LENS = (512, 4096)


@dataclass(frozen=True, slots=True)
class Stream:
    ttft_s: float
    tpot_s: float


@asynccontextmanager
async def fleet(num_prefill: int, num_decode: int) -> AsyncIterator[Fleet]:
    """Ready to serve."""
    async with dummy_fleet(
        {**CONFIG, "vocab_size": VOCAB, "eos_token_id": 2},
        device="cuda",
        prefill_workers=num_prefill,
        decode_workers=num_decode,
        max_num_batched_tokens=2048,
        local_prefill="fallback",
        slo_tpot_ms=10_000,
    ) as made:
        yield made


async def complete(client: httpx.AsyncClient, model: str, prompt_len: int) -> Stream:
    body = {
        "model": model,
        "prompt": [random.randrange(3, VOCAB) for _ in range(prompt_len)],
        "max_tokens": NUM_OUTPUTS,
        "temperature": 1.0,
        "seed": 1,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    started, times = time.perf_counter(), []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    times += [time.perf_counter()] * len(choice.get("token_ids") or ())
    assert len(times) == NUM_OUTPUTS, f"{len(times)} tokens"
    return Stream(times[0] - started, (times[-1] - times[0]) / (NUM_OUTPUTS - 1))


async def metric(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


async def measure(name: str, num_prefill: int, num_decode: int, report: Report) -> None:
    async with (
        fleet(num_prefill, num_decode) as made,
        httpx.AsyncClient(base_url=made.base_url, timeout=60) as client,
    ):
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        for prompt_len in PROMPT_LENS:
            await complete(client, model, prompt_len)
            alone = [await complete(client, model, prompt_len) for _ in range(REPEATS)]
            started = time.perf_counter()
            crowd = await asyncio.gather(
                *(complete(client, model, prompt_len) for _ in range(CROWD))
            )
            took = time.perf_counter() - started
            columns = [
                f"{statistics.median(values) * 1e3:.1f}"
                for values in (
                    [s.ttft_s for s in alone],
                    [s.tpot_s for s in alone],
                    [s.ttft_s for s in crowd],
                    [s.tpot_s for s in crowd],
                )
            ]
            rate = CROWD * NUM_OUTPUTS / took
            report.line(f"| {name} | {prompt_len} | {' | '.join(columns)} | {rate:.0f} |")
        remote = await metric(client, "baton_remote_prefills_total")
        moved = await metric(client, "baton_kv_transfer_bytes_total")
        report.line(f"{name}: {remote:.0f} remote prefills, {moved / 2**20:.0f} MiB moved")
        if num_prefill and not (remote and moved):
            report.wrong(f"{name}: nothing was handed over")


def run(limits: Limits, report: Report) -> None:
    torch.cuda.empty_cache()  # the workers are processes of their own
    report.line(
        f"| workers | prompt | TTFT ms | TPOT ms | TTFT of {CROWD} at once | TPOT of {CROWD} "
        "| tokens/s |"
    )
    report.line("|---|---|---|---|---|---|---|")
    for name, num_prefill, num_decode in (("apart", 1, 1), ("together", 0, 1)):
        with report.attempt(name):
            asyncio.run(measure(name, num_prefill, num_decode, report))
