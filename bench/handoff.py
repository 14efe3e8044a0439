"""What the hand-over costs, and what separation is worth.

    python -m bench.handoff [--repeats 7] [--lengths 32,256,1024] [--transports ucx,grpc]
    python -m bench.handoff --streams [--seconds 20]

Real processes on this host: gateway, workers of one thread each, Redis; a model of 5M random
parameters whose KV is as large as that of much larger ones (float32: 24 KiB per token).

The first form plays the gateway on the wire. Of each prompt, in one go: from "prefill has the first
token" to "decode has the second", minus one decode step (the median of those that follow), over the
bare move: a second fetch of the same KV between the same two processes over the same transport, all
of it ready. D is bound when P admits, when the prefill is half done, or with the first token.

The second form sends long prompts into running streams, to one prefill and one decode worker, and
to two workers that do both: as many cores. TTFT is of the long prompts, ITL and TPOT of the streams
that they run into.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx

import baton
from baton.config import ServeConfig
from baton.fleet import Fleet
from baton.gateway.discovery import Discovery
from baton.gateway.sessions import SessionConfig, WorkerSession
from baton.locality import PrefixIndex
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Failed,
    Imported,
    LegMessage,
    NoRoom,
    Release,
    StepBatch,
    Submit,
)
from baton.rpc import ClusterToken
from baton.types import KVTicket, LegId, Request, SamplingParams, TokenChunk, WorkerInfo

NUM_OUTPUTS = 10
VOCAB = 2048
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": VOCAB,
    "eos_token_id": 2,
}


@asynccontextmanager
async def fleet(
    num_prefill: int, num_decode: int, transports: Sequence[str]
) -> AsyncIterator[Fleet]:
    """A fleet of workers with one thread each, ready to serve."""
    folder = Path(tempfile.mkdtemp(prefix="baton-bench-"))
    for source in (Path(baton.__file__).parent / "demo_model").glob("*token*.json"):
        shutil.copy(source, folder)
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    os.environ["OMP_NUM_THREADS"] = "1"
    made = Fleet(
        ServeConfig(
            model=str(folder),
            load_format="dummy",
            served_model_name="bench",
            port=0,
            threads=1,
            prefill_workers=num_prefill,
            decode_workers=num_decode,
            transports=tuple(transports),
            enable_prefix_caching=False,
            kv_cache_memory_bytes=512 << 20,
        )
    )
    made.start()
    try:
        async with asyncio.timeout(120):
            while await asyncio.to_thread(made.get, "/health") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.25)
        yield made
    finally:
        await made.stop()
        made.clean()
        shutil.rmtree(folder, ignore_errors=True)


# ── the hand-over ────────────────────────────────────────────────────────────────────────────────


class Gateway:
    """As much of one as it takes: sessions to the workers, and when each message came."""

    def __init__(self, redis_url: str) -> None:
        self._inbox: dict[LegId, asyncio.Queue[tuple[float, LegMessage]]] = defaultdict(
            asyncio.Queue
        )
        self.sessions: dict[str, WorkerSession] = {}
        self._num_legs = 0
        self._discovery = Discovery(
            redis_url,
            ServeConfig().cluster,
            (),
            PrefixIndex(),
            on_join=self._on_join,
            on_leave=lambda _: None,
            inventory=_no_inventory,
        )
        self._running = asyncio.create_task(self._discovery.run())

    def _on_join(self, info: WorkerInfo) -> None:
        self.sessions[info.worker_id] = WorkerSession(info, ClusterToken(), self, SessionConfig())

    def session_up(self, info: WorkerInfo) -> None: ...

    def session_lost(self, worker_id: str, reason: str) -> None: ...

    def session_batch(self, worker_id: str, batch: StepBatch) -> None:
        now = time.perf_counter()
        for message in batch.messages:
            self._inbox[message.leg].put_nowait((now, message))

    def new_leg(self) -> LegId:
        self._num_legs += 1
        return LegId(f"bench{self._num_legs}", 1)

    async def take(self, leg: LegId) -> tuple[float, LegMessage]:
        async with asyncio.timeout(60):
            at, message = await self._inbox[leg].get()
        if isinstance(message, Failed | NoRoom):
            raise RuntimeError(f"{message}")
        return at, message

    async def close(self) -> None:
        self._running.cancel()
        for session in self.sessions.values():
            await session.close()


async def _no_inventory(_: WorkerInfo) -> tuple[int, list[object]]:
    return 0, []


@dataclass(slots=True)
class HandOver:
    """Milliseconds of one of them."""

    prefill: float
    between: float  # first token from P to second token from D
    step: float
    bare: float
    num_bytes: int

    @property
    def overhead(self) -> float:
        return self.between - self.step


async def hand_over(gateway: Gateway, length: int, bound: str, prefill_ms: float) -> HandOver:
    """One prompt; `prefill_ms` is what its prefill is expected to take."""
    p, d = gateway.sessions["prefill-0"], gateway.sessions["decode-0"]
    prompt = tuple(random.randrange(10, VOCAB) for _ in range(length))
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    on_p, on_d, again = gateway.new_leg(), gateway.new_leg(), gateway.new_leg()
    p.send(Submit(on_p, Request(on_p.request_id, prompt, sampling)))

    def bind(leg: LegId, ticket: KVTicket) -> None:
        request = Request(leg.request_id, prompt, sampling)
        d.send(Bind(leg, request, ticket, p.info.transports, p.info.host_id))

    wait_s = {"early": 0.0, "half": prefill_ms / 2e3, "late": 60.0}[bound]
    binding: asyncio.TimerHandle | None = None
    ticket: KVTicket | None = None
    admitted_at = first_at = 0.0
    while not first_at:
        at, message = await gateway.take(on_p)
        if isinstance(message, Admitted):
            assert message.ticket is not None
            admitted_at, ticket = at, message.ticket
            binding = asyncio.get_running_loop().call_later(wait_s, bind, on_d, ticket)
        elif isinstance(message, TokenChunk):
            first_at = at
    assert ticket is not None
    assert binding is not None
    if binding.when() > asyncio.get_running_loop().time():
        binding.cancel()
        bind(on_d, ticket)
    times: list[float] = []
    while len(times) < NUM_OUTPUTS:
        at, message = await gateway.take(on_d)
        times += [at] * isinstance(message, TokenChunk)
    bind(again, ticket)
    while not isinstance(message, Imported) or message.leg != again:
        _, message = await gateway.take(again)
    d.send(Abort(again))
    p.send(Release(on_p))
    steps = [(b - a) * 1e3 for a, b in pairwise(times[1:])]
    return HandOver(
        prefill=(first_at - admitted_at) * 1e3,
        between=(times[1] - first_at) * 1e3,
        step=median(steps),
        bare=message.stats.duration_ms,
        num_bytes=message.stats.num_bytes,
    )


async def measure_hand_overs(transport: str, lengths: Sequence[int], repeats: int) -> None:
    async with fleet(1, 1, [transport]) as served:
        gateway = Gateway(served.redis_url)
        try:
            while sum(s.is_up for s in gateway.sessions.values()) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            for length in lengths:
                first = [await hand_over(gateway, length, "late", 0.0) for _ in range(3)]
                prefill_ms = min(made.prefill for made in first)
                rows: dict[str, list[HandOver]] = defaultdict(list)
                for _ in range(repeats):  # in turn, so that a noisy machine hits all alike
                    for bound in ("early", "half", "late"):
                        rows[bound].append(await hand_over(gateway, length, bound, prefill_ms))
                for bound, made in rows.items():
                    print_row(transport, length, bound, made)
        finally:
            await gateway.close()


def print_row(transport: str, length: int, bound: str, made: list[HandOver]) -> None:
    overhead, bare = median(x.overhead for x in made), median(x.bare for x in made)
    columns = [
        f"{length:6} {made[0].num_bytes / 2**20:7.2f} {transport:>5} {bound:>6}",
        f"{median(x.prefill for x in made):8.1f}",
        f"{bare:8.2f}",
        f"{median(x.between for x in made):8.2f}",
        f"{median(x.step for x in made):8.2f}",
        f"{overhead:8.2f}",
        f"{overhead / bare:8.2f}",
    ]
    print(" ".join(columns), flush=True)


# ── running streams ──────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Streams:
    """Milliseconds."""

    ttft: list[float] = field(default_factory=list)  # of the long prompts
    itl: list[float] = field(default_factory=list)  # of the streams they run into
    tpot: list[float] = field(default_factory=list)


async def stream(client: httpx.AsyncClient, length: int, max_tokens: int) -> list[float]:
    """When each token came, the time of asking first."""
    body = {
        "model": "bench",
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


async def run_streams(url: str, seconds: float, num_streams: int, length: int) -> Streams:
    got = Streams()
    stop_at = time.perf_counter() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

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
                await asyncio.sleep(random.uniform(0.0, 0.4))

        await stream(client, length, 2)  # warm
        await asyncio.gather(long(), *(short() for _ in range(num_streams)))
    return got


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


async def measure_streams(seconds: float, num_streams: int, length: int) -> None:
    results: dict[str, Streams] = {}
    for name, workers in (("separated", (1, 1)), ("aggregated", (0, 2))):
        async with fleet(*workers, ["ucx", "grpc"]) as served:
            results[name] = await run_streams(served.base_url, seconds, num_streams, length)
    print(f"{'ms':>12} {'separated':>12} {'aggregated':>12} {'ratio':>8}")
    for metric in ("ttft", "tpot", "itl"):
        for share in (0.5, 0.99):
            one, two = (quantile(getattr(results[n], metric), share) for n in results)
            label = f"{metric.upper()} p{share * 100:.0f}"
            print(f"{label:>12} {one:12.1f} {two:12.1f} {one / two:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lengths", default="32,256,1024")
    parser.add_argument("--transports", default="ucx,grpc")
    parser.add_argument("--streams", action="store_true", help="running streams instead")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--num-streams", type=int, default=4)
    parser.add_argument("--long", type=int, default=1024, help="tokens of a long prompt")
    args = parser.parse_args()
    if args.streams:
        asyncio.run(measure_streams(args.seconds, args.num_streams, args.long))
        return
    print("tokens     MiB  over  bound  prefill     bare  between     step overhead    ratio")
    for transport in args.transports.split(","):
        lengths = [int(length) for length in args.lengths.split(",")]
        asyncio.run(measure_hand_overs(transport, lengths, args.repeats))


if __name__ == "__main__":
    main()
