"""Streams over HTTP: one at a time, and many with long prompts arriving into them."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import httpx

from bench.small_fleet import MODEL_NAME, VOCAB

PAUSE_S = 0.4  # between two long prompts, at most


async def stream(client: httpx.AsyncClient, length: int, max_tokens: int) -> list[float]:
    """Seconds: the time of asking, then of each token."""
    body = {
        "model": MODEL_NAME,
        "prompt": [random.randrange(10, VOCAB) for _ in range(length)],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    times = [time.perf_counter()]
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times


async def routed_gaps(
    client: httpx.AsyncClient, length: int, num_outputs: int
) -> tuple[float, float]:
    """What a client sees of a hand-over, the gateway choosing when to bind: milliseconds between
    the first two tokens, and of one decode step (the median of the other gaps)."""
    times = await stream(client, length, num_outputs)
    first, *others = [(b - a) * 1e3 for a, b in pairwise(times[1:])]
    return first, median(others)


@dataclass(slots=True)
class Streams:
    """Milliseconds."""

    ttft: list[float] = field(default_factory=list)  # of the long prompts
    itl: list[float] = field(default_factory=list)  # of the streams they run into
    tpot: list[float] = field(default_factory=list)


async def warm_up(url: str, length: int) -> None:
    """Let workers learn how fast they are."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(3):
            await stream(client, length, 2)


async def run_streams(
    url: str, seconds: float, num_streams: int, num_long: int, length: int
) -> Streams:
    """`num_streams` streams of 64 tokens and about `num_long` long prompts at any time."""
    got = Streams()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def short() -> None:
            while time.perf_counter() < stop_at:
                times = await stream(client, 32, 64)
                gaps = [(b - a) * 1e3 for a, b in pairwise(times[1:])]
                got.itl += gaps
                got.tpot.append(sum(gaps) / len(gaps))

        async def long() -> None:
            while time.perf_counter() < stop_at:
                times = await stream(client, length, 2)
                got.ttft.append((times[1] - times[0]) * 1e3)
                await asyncio.sleep(random.uniform(0.0, PAUSE_S))

        stop_at = time.perf_counter() + seconds
        running = [short() for _ in range(num_streams)] + [long() for _ in range(num_long)]
        await asyncio.gather(*running)
    return got


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]
