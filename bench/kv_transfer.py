"""How fast KV moves between two processes, beside what the machine can do.

    python -m bench.kv_transfer [--sizes 1b,1m,16m,64m] [--transports shm,grpc] [--repeats 15]

Two rows per transport and size:

    transport     frames that are packed and checksummed already, taken and dropped
    pool to pool  pack, checksum, move, verify, unpack

beside them what pool to pool costs without any protocol (copies alone, see
`bench.kv_transfer_floor`), and, measured in the same run right before each of them: a bare
one-stream loopback TCP copy (1 MiB sends) and a memcpy; beside one block, an empty streaming call.
Each row is taken `--repeats` times (less if time runs out) in turn with the others and the best
counts, on both sides of a ratio: noise only ever adds time. CPU seconds are of both processes. At
the end: the table of docs/performance.md, and whether the targets hold.

The KV is that of a 0.5B-parameter model: 24 layers, 2 KV heads of 64, bfloat16, blocks of 16
tokens; 1b is one block (192 KiB).
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import torch

from baton.engine.kv_cache import KVCache
from baton.errors import BatonError
from baton.kvtransfer.base import Attachment, FetchOpen, Incoming, Outgoing, Staging, Transport
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.exporter import BESIDE_FRAME_BYTES, FRAME_BYTES, Exporter, ExportFeed
from baton.kvtransfer.frames import unsealed
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.memory import KVMemory, keep_freed_memory
from baton.kvtransfer.negotiate import make_transports
from baton.kvtransfer.progress import KVReady
from baton.rpc import ClusterToken, RpcServer
from baton.types import BlockId, KVGroup, KVKind, KVLayout, KVRange, KVTicket, TransportAddress
from bench.kv_transfer_floor import make_ring, serve_copies, take_copies
from bench.kv_transfer_report import (
    COPIES,
    EMPTY,
    MIB,
    POOL,
    TRANSPORT,
    Line,
    Samples,
    describe,
    show,
    show_markdown,
    show_targets,
)

BLOCK = 16
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 24, 2, 64, "bfloat16"),), BLOCK)


def kv_memory(num_tokens: int, seed: int, device: str) -> tuple[KVMemory, list[BlockId]]:
    """A pool of twice as many blocks as needed, and shuffled blocks of it for so many tokens."""
    num_blocks = -(-num_tokens // BLOCK)
    cache = KVCache(LAYOUT, 2 * num_blocks, torch.device(device)).tensor.fill_(seed)
    order = torch.randperm(2 * num_blocks, generator=torch.Generator().manual_seed(seed))
    return KVMemory(cache, LAYOUT), [BlockId(int(b)) for b in order[:num_blocks]]


def fetch_of(num_tokens: int, row: str) -> FetchOpen:
    digest, nothing = bytes(32), bytes(16)
    ticket = KVTicket(
        nothing, "-:1", nothing, digest, LAYOUT, num_tokens, digest, digest, 1, 1, digest
    )
    where = KVRange(0, LAYOUT.num_layers, 0, num_tokens)
    return FetchOpen(ticket, where, LAYOUT, digest, digest, digest, consumer=row)


@asynccontextmanager
async def transports(names: list[str], memory: KVMemory) -> AsyncIterator[dict[str, Transport]]:
    """One worker's transports, by name."""
    server = RpcServer(ClusterToken())
    calls = FetchCalls(server.grpc, ClusterToken())
    address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    await server.start()
    made = make_transports(names, calls, address, memory.device)
    yield {transport.name: transport for transport in made}
    for transport in made:
        await transport.close()
    await calls.close()
    await server.stop(0)


# ── the producer's process ───────────────────────────────────────────────────────────────────────


class Source:
    """Serves the row that the consumer names; everything is ready."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    async def attach(self, fetch: FetchOpen) -> Attachment:
        if fetch.consumer == POOL:
            return await self._exporter.attach(fetch)
        num_bytes = fetch.range.num_tokens * LAYOUT.token_bytes if fetch.consumer != EMPTY else 1
        return Packed(num_bytes)


class Packed:
    """An attachment whose frames cost nothing to make."""

    epoch = 1
    num_ready_tokens = 0

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    async def frames(self, staging: Staging) -> AsyncGenerator[Outgoing, None]:
        if staging.device is not None:
            payload = staging.device.buffer(BESIDE_FRAME_BYTES)
            for start in range(0, self._num_bytes, BESIDE_FRAME_BYTES):
                await staging.take(1)
                yield unsealed(payload[: self._num_bytes - start])
            return
        frame = np.zeros(FRAME_BYTES, np.uint8).data
        for start in range(0, self._num_bytes, FRAME_BYTES):
            await staging.take(1)
            yield (frame[: self._num_bytes - start],)

    async def failed(self) -> BatonError:
        await asyncio.Event().wait()
        raise AssertionError

    def done(self) -> None: ...

    async def close(self) -> None: ...


class OpenGate:
    """Lets everybody read everything; an `ExportGate`."""

    def __init__(self, block_ids: list[BlockId]) -> None:
        self._block_ids = block_ids

    async def attach(self, fetch: FetchOpen) -> ExportFeed:
        return ExportFeed(1, self._block_ids, KVReady(fetch.range.token_stop), b"")

    def progress(self, epoch: int, num_sent_tokens: int) -> None: ...

    def done(self, epoch: int) -> None: ...

    def closed(self, epoch: int) -> None: ...


def produce(control: Connection, names: list[str], max_tokens: int, device: str) -> None:
    keep_freed_memory()
    asyncio.run(_produce(control, names, max_tokens, device))


async def _produce(control: Connection, names: list[str], max_tokens: int, device: str) -> None:
    memory, block_ids = kv_memory(max_tokens, seed=1, device=device)
    source = Source(Exporter(memory, OpenGate(block_ids)))
    listener, ring = socket.create_server(("127.0.0.1", 0)), make_ring()
    threading.Thread(target=serve_tcp, args=(listener,), daemon=True).start()
    copies = socket.create_server(("127.0.0.1", 0))
    arguments = (copies, ring, memory, block_ids)
    threading.Thread(target=serve_copies, args=arguments, daemon=True).start()
    async with transports(names, memory) as mine:
        addresses = {name: await transport.start(source) for name, transport in mine.items()}
        control.send((addresses, listener.getsockname(), copies.getsockname(), ring.name))
        while await asyncio.to_thread(control.recv) == "cpu":
            control.send(time.process_time())
    memory.close()
    ring.unlink()


def serve_tcp(listener: socket.socket) -> None:
    """The baseline: 8 bytes with a size come in, that many bytes go out."""
    data = np.zeros(MIB, np.uint8).data
    with listener.accept()[0] as connection:
        while request := connection.recv(8):
            for start in range(0, size := int.from_bytes(request, "little"), MIB):
                connection.sendall(data[: size - start])


# ── the consumer's process ───────────────────────────────────────────────────────────────────────


class Counter:
    """A sink that drops what it gets."""

    def __init__(self, num_bytes: int) -> None:
        self._num_left = num_bytes

    def opened(self, epoch: int, num_ready_tokens: int) -> None: ...

    async def frame(self, *frames: Incoming) -> bool:
        self._num_left -= sum(map(len, frames))
        return self._num_left <= 0

    def patience_s(self) -> float | None:
        return None


class Bench:
    def __init__(
        self,
        control: Connection,
        tcp: socket.socket,
        copies: socket.socket,
        ring: SharedMemory,
        mine: dict[str, Transport],
        theirs: dict[str, TransportAddress],
        memory: KVMemory,
        block_ids: list[BlockId],
    ) -> None:
        self._control = control
        self._tcp = tcp
        self._copies = copies
        self._ring = ring
        self._mine = mine
        self._theirs = theirs
        self._memory, self._block_ids = memory, block_ids
        self._target = bytearray(len(block_ids) * BLOCK * LAYOUT.token_bytes)
        self._source = bytearray(b"\1") * len(self._target)

    def memcpy(self, num_bytes: int) -> float:
        source, target = memoryview(self._source), memoryview(self._target)
        started_s = time.perf_counter()
        target[:num_bytes] = source[:num_bytes]
        return time.perf_counter() - started_s

    def copy_tcp(self, num_bytes: int) -> float:
        target, got = memoryview(self._target), 0
        started_s = time.perf_counter()
        self._tcp.sendall(num_bytes.to_bytes(8, "little"))
        while got < num_bytes:
            got += self._tcp.recv_into(target[got : min(num_bytes, got + MIB)])
        return time.perf_counter() - started_s

    async def take(self, name: str, row: str, num_tokens: int, samples: Samples) -> None:
        """One sample."""
        num_bytes = num_tokens * LAYOUT.token_bytes
        samples.memcpy_s.append(self.memcpy(num_bytes))
        samples.tcp_s.append(self.copy_tcp(num_bytes))
        if row == COPIES:
            self._copy_alone(num_tokens, samples)
        else:
            await self._fetch(name, row, num_tokens, samples)

    def _copy_alone(self, num_tokens: int, samples: Samples) -> None:
        where = (self._copies, self._ring, self._memory, self._block_ids)
        cpu_s, started_s = self._cpu_s(), time.perf_counter()
        samples.num_frames = take_copies(*where, num_tokens)
        samples.seconds.append(time.perf_counter() - started_s)
        samples.cpu_s.append(self._cpu_s() - cpu_s)

    async def _fetch(self, name: str, row: str, num_tokens: int, samples: Samples) -> None:
        fetch = fetch_of(num_tokens, row)
        sink: Importer | Counter = (
            Importer(self._memory, self._block_ids, fetch.range)
            if row == POOL
            else Counter(num_tokens * LAYOUT.token_bytes if row == TRANSPORT else 1)
        )
        cpu_s, started_s = self._cpu_s(), time.perf_counter()
        stats = await self._mine[name].fetch(self._theirs[name], fetch, sink)
        samples.seconds.append(time.perf_counter() - started_s)
        samples.cpu_s.append(self._cpu_s() - cpu_s)
        samples.num_frames = stats.num_frames

    def _cpu_s(self) -> float:
        """Used so far, by both processes."""
        self._control.send("cpu")
        return float(self._control.recv()) + time.process_time()

    async def run(self, num_tokens: int, repeats: int, max_s: float) -> list[Line]:
        """All rows of one size; at least two repeats, no more once `max_s` are over."""
        num_bytes = num_tokens * LAYOUT.token_bytes
        of = (EMPTY, TRANSPORT, POOL) if num_tokens <= BLOCK else (TRANSPORT, POOL)
        rows = {(name, row): Samples() for name in self._mine for row in of}
        rows["none", COPIES] = Samples()
        started_s = time.perf_counter()
        for repeat in range(-1, repeats):  # the first one warms up
            if repeat >= 2 and time.perf_counter() - started_s > max_s:
                break
            for (name, row), samples in rows.items():
                kept = samples if repeat >= 0 else Samples()
                await self.take(name, row, num_tokens, kept)
        return [describe(name, row, num_bytes, samples) for (name, row), samples in rows.items()]


def save(path: str, report: list[Line]) -> None:
    Path(path).write_text(json.dumps(report, indent=1), encoding="ascii")


def tokens_of(size: str) -> int:
    """'1b' (blocks), '16m' (MiB) or '1g' (GiB) → tokens."""
    number, unit = float(size[:-1]), size[-1]
    num_bytes = number * (MIB << 10 if unit == "g" else MIB)
    return int(number * BLOCK if unit == "b" else num_bytes // LAYOUT.token_bytes)


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", default="1b,1m,16m,64m,256m,1g")
    parser.add_argument("--transports", default="shm,ucx,grpc")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=300.0, help="in all, about")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--device", default="cpu", help="of both KV pools: cpu or cuda")
    arguments = parser.parse_args()
    sizes = [tokens_of(size) for size in arguments.sizes.split(",")]
    names = arguments.transports.split(",")
    spawn = multiprocessing.get_context("spawn")
    control, theirs = spawn.Pipe()
    child = spawn.Process(
        target=produce, args=(theirs, names, max(sizes), arguments.device), daemon=True
    )
    child.start()
    addresses, tcp_address, copies_address, ring_name = control.recv()
    ring = SharedMemory(ring_name)
    with (
        socket.create_connection(tcp_address) as tcp,
        socket.create_connection(copies_address) as copies,
    ):
        memory, block_ids = kv_memory(max(sizes), seed=2, device=arguments.device)
        async with transports(names, memory) as mine:
            bench = Bench(control, tcp, copies, ring, mine, addresses, memory, block_ids)
            report: list[Line] = []
            for num_tokens in sizes:
                max_s = arguments.max_seconds / len(sizes)
                report += (lines := await bench.run(num_tokens, arguments.repeats, max_s))
                show(lines)
        memory.close()
    control.send("stop")
    child.join()
    show_markdown(report)
    show_targets(report)
    if arguments.json:
        save(arguments.json, report)


if __name__ == "__main__":
    keep_freed_memory()
    asyncio.run(main())
