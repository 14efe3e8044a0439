"""What the tests of the exchange share: pools with known content, a scripted producer, a recording
consumer, and pairs of connected transports."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baton.errors import BatonError, Cause
from baton.kernels.kv_pack import pack_kv_torch, payload_bytes
from baton.kvtransfer.base import (
    Attachment,
    Buffers,
    DeviceFrame,
    DeviceMemory,
    FetchOpen,
    Incoming,
    Outgoing,
    Staging,
    Transport,
)
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.device_staging import DeviceStaging
from baton.kvtransfer.exporter import ExportFeed
from baton.kvtransfer.grpc_stream import GrpcTransport
from baton.kvtransfer.local import LocalNetwork, LocalTransport
from baton.kvtransfer.memory import KVMemory, heap_buffer
from baton.kvtransfer.progress import KVReady
from baton.kvtransfer.shm import ShmTransport
from baton.rpc import ClusterToken, RpcServer
from baton.types import BlockId, KVGroup, KVKind, KVLayout, KVRange, KVTicket

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 3, 2, 8
TOKEN_BYTES = NUM_LAYERS * 2 * NUM_HEADS * HEAD_DIM * 2
DIGEST = hashlib.sha256(b"").digest()


def make_layout(block_size: int = 16) -> KVLayout:
    group = KVGroup(KVKind.FULL, NUM_LAYERS, NUM_HEADS, HEAD_DIM, "bfloat16")
    return KVLayout((group,), block_size)


def make_fetch(
    num_tokens: int, token_start: int = 0, initial_credit: int = 8, consumer: str = "d0"
) -> FetchOpen:
    ticket = KVTicket(
        transfer_id=bytes(16),
        address="unused:1",
        incarnation=bytes(16),
        fingerprint=DIGEST,
        layout=make_layout(),
        num_tokens=max(num_tokens, 1),
        tokens_digest=DIGEST,
        salt_digest=DIGEST,
        expires_at_ms=1,
        key_id=1,
        mac=DIGEST,
    )
    where = KVRange(0, NUM_LAYERS, token_start, num_tokens)
    layout = make_layout()
    return FetchOpen(ticket, where, layout, DIGEST, DIGEST, DIGEST, consumer, initial_credit, 7)


# ── pools ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Pool:
    """A KV pool with known content."""

    cache: Tensor
    memory: KVMemory
    block_ids: list[BlockId]

    def content(self, where: KVRange) -> bytes:
        """What the blocks hold, in wire order."""
        cache = self.cache.cpu()
        wire = torch.empty(payload_bytes(cache, where), dtype=torch.uint8)
        pack_kv_torch(cache, self.block_ids, where, wire)
        return wire.numpy().tobytes()


def on_device(pool: Pool) -> Pool:
    """The same pool in CUDA memory; where there is none, on the CPU, treated as if it were."""
    if torch.cuda.is_available():
        cache = pool.cache.cuda()
        return Pool(cache, KVMemory(cache, pool.memory.layout), pool.block_ids)
    memory = KVMemory(pool.cache, pool.memory.layout, DeviceStaging(pool.cache))
    return Pool(pool.cache, memory, pool.block_ids)


def make_pool(block_size: int, block_ids: Sequence[int], seed: int) -> Pool:
    num_blocks = max(block_ids) + 1
    shape = (NUM_LAYERS, 2, num_blocks, block_size, NUM_HEADS, HEAD_DIM)
    cache = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    memory = KVMemory(cache, make_layout(block_size))
    return Pool(cache, memory, [BlockId(b) for b in block_ids])


class Gate:
    """An `ExportGate` that lets everybody read one pool, and writes down what it is told."""

    def __init__(self, pool: Pool, num_ready_tokens: int, end_payload: bytes | None) -> None:
        self.pool = pool
        self.num_ready_tokens = num_ready_tokens
        self.end_payload = end_payload
        self.refusal: BatonError | None = None
        self.feeds: list[ExportFeed] = []
        self.told: list[tuple[str, int]] = []
        self.sent: list[int] = []
        self.attached = asyncio.Event()

    async def attach(self, fetch: FetchOpen) -> ExportFeed:
        if self.refusal is not None:
            raise self.refusal
        ready = KVReady(self.num_ready_tokens)
        epoch = 1000 + len(self.feeds)
        feed = ExportFeed(epoch, self.pool.block_ids, ready, self.end_payload)
        self.feeds.append(feed)
        self.attached.set()
        return feed

    def progress(self, epoch: int, num_sent_tokens: int) -> None:
        self.sent.append(num_sent_tokens)

    def done(self, epoch: int) -> None:
        self.told.append(("done", epoch))

    def closed(self, epoch: int) -> None:
        self.told.append(("closed", epoch))


# ── scripted ends of a transport ─────────────────────────────────────────────────────────────────

Script = Callable[["ScriptedAttachment"], AsyncGenerator[Outgoing, None]]


class Unbounded:
    """A `Staging` for whoever takes every frame at once."""

    device: DeviceMemory | None = None

    async def take(self, max_frames: int, frame_bytes: int = 0) -> int:
        return max_frames

    def buffer(self, num_bytes: int) -> memoryview:
        return heap_buffer(num_bytes)


class ScriptedAttachment:
    """Yields what its script yields and writes down what happens to it."""

    def __init__(self, epoch: int, script: Script) -> None:
        self.epoch = epoch
        self.num_ready_tokens = 7
        self.num_yielded = 0
        self.is_done = False
        self.is_iterating = False
        self.closed = asyncio.Event()
        self.yielded = asyncio.Event()  # set at each frame; tests clear it
        self.cut: asyncio.Future[BatonError] = asyncio.get_running_loop().create_future()
        self._script = script

    async def frames(self, staging: Staging) -> AsyncGenerator[Outgoing, None]:
        self.is_iterating = True
        try:
            async for frame in self._script(self):
                await staging.take(1)
                assert not self.closed.is_set(), "read after close"
                self.num_yielded += 1
                self.yielded.set()
                yield frame
        finally:
            self.is_iterating = False

    async def failed(self) -> BatonError:
        return await asyncio.shield(self.cut)

    def done(self) -> None:
        self.is_done = True

    async def close(self) -> None:
        assert not self.is_iterating, "closed while it is being read"
        self.closed.set()


class ScriptedSource:
    """A `FrameSource`; keeps its attachments."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.refusal: BatonError | None = None
        self.fetches: list[FetchOpen] = []
        self.attachments: list[ScriptedAttachment] = []

    async def attach(self, fetch: FetchOpen) -> Attachment:
        if self.refusal is not None:
            raise self.refusal
        self.fetches.append(fetch)
        self.attachments.append(ScriptedAttachment(500 + len(self.attachments), self.script))
        return self.attachments[-1]

    async def attachment(self, index: int = 0) -> ScriptedAttachment:
        while len(self.attachments) <= index:
            await asyncio.sleep(0.002)
        return self.attachments[index]


def frames_script(frames: Sequence[bytes]) -> Script:
    """These frames, each in two parts, then the end."""

    async def script(_attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
        for frame in frames:
            yield (frame[:64], memoryview(frame)[64:])

    return script


@dataclass
class RecordingSink:
    """A `FrameSink` that wants `num_wanted` frames."""

    num_wanted: int
    patience: float | None = None
    hold: asyncio.Event | None = None  # waits for it in every frame, uninterrupted
    reject_at: int = -1
    frames: list[bytes] = field(default_factory=list)
    epoch: int | None = None
    is_busy: bool = False
    entered: asyncio.Event = field(default_factory=asyncio.Event)

    def opened(self, epoch: int, num_ready_tokens: int) -> None:
        assert self.epoch is None, "opened twice"
        self.epoch = epoch
        assert num_ready_tokens == 7

    async def frame(self, *frames: Incoming) -> bool:
        assert frames
        for data in frames:
            if len(self.frames) < self.num_wanted:
                await self._frame(data)
        return len(self.frames) == self.num_wanted

    async def _frame(self, data: Incoming) -> None:
        assert self.epoch is not None, "a frame before opened"
        assert not self.is_busy, "two frames at once"
        self.is_busy = True
        self.entered.set()
        try:
            if len(self.frames) == self.reject_at:
                raise BatonError(Cause.FRAME_CORRUPT, "rejected by the sink")
            if self.hold is not None:
                await _until(self.hold)
            if isinstance(data, DeviceFrame):
                data = bytes(data.header) + data.payload.cpu().numpy().tobytes()
            self.frames.append(bytes(data))
        finally:
            self.is_busy = False

    def patience_s(self) -> float | None:
        return self.patience


async def _until(event: asyncio.Event) -> None:
    """As a thread that cannot be interrupted: cancellation is raised only afterwards."""
    asyncio.get_running_loop().call_later(30, event.set)  # so that a failed test ends
    cancelled = False
    while not event.is_set():
        try:
            await event.wait()
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


# ── pairs of transports ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pair:
    producer: Transport
    consumer: Transport


@asynccontextmanager
async def connected(name: str) -> AsyncIterator[Pair]:
    """Two transports of one kind that reach each other; the producer's is not started."""
    if name == "local":
        network = LocalNetwork()
        pair = Pair(LocalTransport(network, "p"), LocalTransport(network, "d"))
        try:
            yield pair
        finally:
            await pair.consumer.close()
            await pair.producer.close()
        return
    async with grpc_end(name) as producer, grpc_end(name) as consumer:
        yield Pair(producer, consumer)


@asynccontextmanager
async def grpc_end(name: str, device: DeviceMemory | None = None) -> AsyncIterator[Transport]:
    """One worker's transport over its own gRPC server."""
    token = ClusterToken(("secret",))
    server = RpcServer(token)
    calls = FetchCalls(server.grpc, token)
    address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    await server.start()
    transport = make_transport(name, calls, address, device)
    try:
        yield transport
    finally:
        await transport.close()
        await calls.close()
        await server.stop(0)


def make_transport(
    name: str, calls: FetchCalls, address: str, device: DeviceMemory | None = None
) -> Transport:
    if name == "grpc":
        return GrpcTransport(calls, address)
    if name == "shm":
        return ShmTransport(calls, address)
    from baton.kvtransfer.ucx import UcxTransport

    assert (name == "cuda") == (device is not None)
    return UcxTransport(calls, address, device)
