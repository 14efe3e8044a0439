"""What a streamed chunk costs the client, with httpx and with aiohttp.

    python -m bench.http_client [--streams 256] [--chunks 200] [--interval-ms 40]

A bare asyncio server in a process of its own writes one event to every open stream, then the next
to every stream, as an engine's steps would. The client reads all streams at once and takes the
time of each event; the figure is its CPU time per event. docs/decisions/http-client.md says what
follows.
"""

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import aiohttp
import httpx
import uvloop

from baton.benchmarks.measure import measure as measure_stream
from baton.client.api import ApiClient

EVENT = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1_700_000_000,
    "model": "baton-demo",
    "choices": [{"index": 0, "text": " word", "token_ids": [4711]}],
}
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: close\r\n\r\n"
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def _serve(pipe: Connection, num_streams: int, num_chunks: int, interval_s: float) -> None:
    waiting: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        await reader.readexactly(length)
        writer.write(HEAD)
        waiting.append(writer)
        if len(waiting) == num_streams:
            writers = waiting.copy()
            waiting.clear()
            await _write(writers)

    async def _write(writers: list[asyncio.StreamWriter]) -> None:
        event = _chunk(b"data: " + json.dumps(EVENT).encode() + b"\n\n")
        for _ in range(num_chunks):
            for writer in writers:
                writer.write(event)
            await asyncio.gather(*(writer.drain() for writer in writers))
            await asyncio.sleep(interval_s)
        for writer in writers:
            writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=1024)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def run_server(pipe: Connection, num_streams: int, num_chunks: int, interval_s: float) -> None:
    asyncio.run(_serve(pipe, num_streams, num_chunks, interval_s))


def events_of(data: bytes) -> int:
    """Whole events in what one read gave; each is parsed, as a benchmark does."""
    count = 0
    for line in data.split(b"\n"):
        if line.startswith(b"data: {"):
            json.loads(line[6:])
            count += 1
    return count


async def with_httpx(url: str, num_streams: int) -> int:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:

        async def one() -> int:
            count, times = 0, []
            async with client.stream("POST", url, json={"prompt": "x"}) as response:
                async for line in response.aiter_lines():
                    times.append(time.perf_counter())
                    count += events_of(line.encode())
            return count

        return sum(await asyncio.gather(*(one() for _ in range(num_streams))))


async def with_aiohttp(url: str, num_streams: int) -> int:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one() -> int:
            count, times, rest = 0, [], b""
            async with session.post(url, json={"prompt": "x"}) as response:
                async for data in response.content.iter_any():
                    times.append(time.perf_counter())
                    whole, end, rest = (rest + data).rpartition(b"\n\n")
                    count += events_of(whole + end)
            return count

        return sum(await asyncio.gather(*(one() for _ in range(num_streams))))


async def with_measure(url: str, num_streams: int) -> int:
    """What `baton bench serve` does of each request."""
    async with ApiClient(url) as client:
        outcomes = await asyncio.gather(
            *(measure_stream(client, "/", {}, 1, keep_text=False) for _ in range(num_streams))
        )
    return sum(outcome.output_len for outcome in outcomes)


CLIENTS: dict[str, Callable[[str, int], Awaitable[int]]] = {
    "httpx": with_httpx,
    "aiohttp": with_aiohttp,
    "aiohttp, uvloop": with_aiohttp,
    "bench serve": with_measure,  # on uvloop too
}


ON_UVLOOP = ("aiohttp, uvloop", "bench serve")


def measure(name: str, port: int, num_streams: int, num_chunks: int) -> float:
    """CPU seconds of this process per event."""

    async def run() -> None:
        count = await CLIENTS[name](f"http://127.0.0.1:{port}/", num_streams)
        assert count == num_streams * num_chunks, (count, num_streams * num_chunks)

    began = time.process_time()
    factory = uvloop.new_event_loop if name in ON_UVLOOP else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())
    return (time.process_time() - began) / (num_streams * num_chunks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--interval-ms", type=float, default=40.0, help="between two steps")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    server = spawn.Process(
        target=run_server,
        args=(theirs, args.streams, args.chunks, args.interval_ms / 1e3),
        daemon=True,
    )
    server.start()
    port = ours.recv()
    best = dict.fromkeys(CLIENTS, float("inf"))
    for _ in range(args.rounds):  # in turn, so that a busy machine is unfair to none
        for name in CLIENTS:
            best[name] = min(best[name], measure(name, port, args.streams, args.chunks))
    server.terminate()
    for name, seconds in best.items():
        print(f"{name:16} {seconds * 1e6:8.1f} µs CPU per event, {best['httpx'] / seconds:6.2f} ×")


if __name__ == "__main__":
    main()
