"""What the gateway itself costs, with workers that answer instantly.

    python -m bench.gateway [--requests 2000] [--streams 64] [--tokens 256] [--profile]

Gateway, null worker and client are three processes. Rates are per second of the *gateway's own CPU
time*, so that what the other two take does not count:

    requests/s        POST /v1/completions, one output token, not streamed
    streamed tokens/s `--streams` streams of `--tokens` tokens at once, one token a chunk

TTFT of a 512-token prompt is compared, request by request in turn, with a bare FastAPI application
that streams the same bytes. Added latency: TTFT while requests arrive at random at half the rate
that one core sustains, less the median of an idle gateway. Event-loop stall: how late a timer of
1 ms comes in the gateway's loop, over the whole run.
"""

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import pstats
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles

import psutil
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from baton.config import GatewayConfig, ServeConfig
from baton.gateway import server
from baton.gateway.defaults import SamplingDefaults
from baton.redis_server import redis_command, redis_url
from baton.text import Tokenizer
from bench import null_worker

TEXT = "def main(arguments):\n    return [str(value) for value in arguments]\n"
PROMPT_LEN = 512
STALL_TIMER_S = 0.001


# ── processes ────────────────────────────────────────────────────────────────────────────────────


def run_gateway(url: str, pipe: Connection, profile: bool) -> None:
    config = GatewayConfig(
        model=str(ServeConfig().model_source),
        served_model_name="null",
        port=0,
        redis_url=url,
        log_level="warning",
        max_pending_requests=4096,
    )
    tokenizer = Tokenizer.from_pretrained(config.tokenizer_source)
    listener = server.listen("127.0.0.1", 0, config.slow_client_timeout_s)
    pipe.send(listener.getsockname()[1])
    stalls: list[float] = []

    async def watch() -> None:
        while True:
            due = time.monotonic() + STALL_TIMER_S
            await asyncio.sleep(STALL_TIMER_S)
            stalls.append(time.monotonic() - due)

    async def main() -> None:
        watching = asyncio.create_task(watch())
        defaults = SamplingDefaults.load(config, tokenizer)
        await server.serve(config, tokenizer, defaults, listener)
        watching.cancel()

    profiler = cProfile.Profile(time.thread_time)
    if profile:
        profiler.enable()
    with server.event_loop() as runner:
        runner.run(main())
    profiler.disable()
    pipe.send(stalls)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def run_worker(url: str, token_ids: list[int], vocab_size: int) -> None:
    asyncio.run(null_worker.serve(url, token_ids, vocab_size))


def run_echo(chunks: list[bytes], pipe: Connection) -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(body: dict[str, object]) -> StreamingResponse:
        async def stream() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        return StreamingResponse(stream(), media_type="text/event-stream")

    listener = server.listen("127.0.0.1", 0, 60.0)
    pipe.send(listener.getsockname()[1])
    config = uvicorn.Config(app, http="httptools", log_level="warning", access_log=False)
    with server.event_loop() as runner:  # the same, which is also uvicorn's own choice
        runner.run(uvicorn.Server(config).serve([listener]))


@contextmanager
def child(target: Callable[..., None], *args: object) -> Iterator[multiprocessing.Process]:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join(15)


# ── client ───────────────────────────────────────────────────────────────────────────────────────


class Client:
    """One keep-alive connection; as little work per byte as Python allows."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> tuple[float, float, bytes]:
        """(seconds to the first byte of the answer's body, to its end, the body as sent)."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        reader, writer = self._streams
        started = time.perf_counter()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(head.decode() + (await reader.read(2000)).decode())
        if b"content-length: " in head:
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            data = await reader.readexactly(length)
            first_s = time.perf_counter() - started
        else:
            data = await reader.readuntil(b"\r\n")  # the size of the first chunk
            first_s = time.perf_counter() - started
            if not data.startswith(b"0"):
                data += await reader.readuntil(b"0\r\n\r\n")
        return first_s, time.perf_counter() - started, data

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def body_of(prompt: object, max_tokens: int, stream: bool) -> bytes:
    fields = {"model": "null", "prompt": prompt, "max_tokens": max_tokens, "stream": stream}
    return json.dumps(fields | {"temperature": 0, "ignore_eos": True}).encode()


async def wait_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        client = Client(port)
        try:
            await client.post(body_of("x", 1, stream=False))
            return
        except RuntimeError:
            await asyncio.sleep(0.2)
        finally:
            client.close()
    raise RuntimeError("the gateway does not become ready")


async def in_parallel(port: int, bodies: list[bytes], num_clients: int) -> list[bytes]:
    """All bodies over so many connections; the answers."""
    left, answers = iter(bodies), []

    async def work() -> None:
        client = Client(port)
        for body in left:
            answers.append((await client.post(body))[2])
        client.close()

    await asyncio.gather(*(work() for _ in range(num_clients)))
    return answers


async def at_random(port: int, body: bytes, rate: float, count: int) -> list[float]:
    """TTFT of requests that arrive in a Poisson process, counted from their intended times."""
    idle: list[Client] = []
    loop, at = asyncio.get_running_loop(), time.perf_counter()
    rng = random.Random(0)

    async def one(due: float) -> float:
        client = idle.pop() if idle else Client(port)
        late_s = time.perf_counter() - due
        first_s, _, _ = await client.post(body)
        idle.append(client)
        return late_s + first_s

    tasks = []
    for _ in range(count):
        at += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(loop.create_task(one(at)))
    ttfts = list(await asyncio.gather(*tasks))
    for client in idle:
        client.close()
    return ttfts


# ── measurements ─────────────────────────────────────────────────────────────────────────────────


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100)[percent - 1]


async def compare_ttft(port: int, body: bytes, repeats: int) -> tuple[list[float], list[float]]:
    """TTFT at the gateway and at an echo of the same bytes, in turn."""
    client = Client(port)
    _, _, raw = await client.post(body)
    events = [part + b"\n\n" for part in _dechunk(raw).split(b"\n\n") if part]
    ours, theirs = multiprocessing.Pipe()
    with child(run_echo, events, theirs):
        echo = Client(ours.recv())
        await asyncio.sleep(1.0)
        gateway_s, echo_s = [], []
        for _ in range(repeats):
            gateway_s.append((await client.post(body))[0])
            echo_s.append((await echo.post(body))[0])
        echo.close()
    client.close()
    return gateway_s[10:], echo_s[10:]


def _dechunk(raw: bytes) -> bytes:
    """The payload of HTTP chunks."""
    out = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        out, raw = out + raw[:length], raw[length + 2 :]
        if not length:
            break
    return out


async def measure(port: int, pid: int, args: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    prompt = [5 + i % 200 for i in range(PROMPT_LEN)]
    long_stream = body_of(prompt, 16, stream=True)
    gateway_s, echo_s = await compare_ttft(port, long_stream, 210)
    figures["TTFT of a 512-token prompt, p50, ms"] = median(gateway_s) * 1e3
    figures["  bare FastAPI with the same bytes, ms"] = median(echo_s) * 1e3
    figures["  ratio"] = median(gateway_s) / median(echo_s)

    began = cpu_s(pid)
    await in_parallel(port, [body_of("def ", 1, stream=False)] * args.requests, 16)
    per_request_s = (cpu_s(pid) - began) / args.requests
    figures["requests/s per core"] = 1 / per_request_s

    began = cpu_s(pid)
    streams = [body_of("def ", args.tokens, stream=True)] * (2 * args.streams)
    answers = await in_parallel(port, streams, args.streams)
    num_chunks = sum(answer.count(b"data: {") for answer in answers)
    spent_s = cpu_s(pid) - began - len(streams) * per_request_s
    figures["streamed tokens/s per core"] = len(streams) * args.tokens / spent_s
    figures["  tokens in a chunk"] = len(streams) * args.tokens / num_chunks

    rate = 0.5 / per_request_s
    ttfts = await at_random(port, body_of("def ", 1, stream=False), rate, args.requests)
    idle = await at_random(port, body_of("def ", 1, stream=False), 20.0, 60)
    figures["added latency at half load, p50, ms"] = (median(ttfts) - median(idle)) * 1e3
    figures["added latency at half load, p99, ms"] = (percentile(ttfts, 99) - median(idle)) * 1e3
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--profile", action="store_true", help="of the gateway, at the end")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(str(ServeConfig().model_source))
    token_ids = list(tokenizer.encode(TEXT))
    with tempfile.TemporaryDirectory(prefix="bt-") as folder:
        url = redis_url(Path(folder))
        redis = subprocess.Popen(redis_command(Path(folder)), stdout=sys.stderr)
        ours, theirs = multiprocessing.Pipe()
        try:
            with (
                child(run_worker, url, token_ids, 2048),
                child(run_gateway, url, theirs, args.profile) as gateway,
            ):
                port, pid = ours.recv(), gateway.pid
                assert pid is not None, "it has been started"
                asyncio.run(wait_ready(port))
                figures = asyncio.run(measure(port, pid, args))
                gateway.terminate()
                stalls = ours.recv()
                gateway.join(15)
        finally:
            redis.terminate()
            redis.wait()
    figures["event-loop stall, p99, ms"] = percentile(stalls, 99) * 1e3
    for name, value in figures.items():
        print(f"{name:42} {value:10.2f}")


if __name__ == "__main__":
    main()
