"""KV.Fetch in the simulator: real frames, real importer, real lease and reservation tables; the
transfer threads are events that take time."""

import struct
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from baton.engine.null_runner import NullRunner
from baton.errors import BatonError, Cause
from baton.grants import HashChain
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import AttachGranted
from baton.kvtransfer.exporter import next_parts
from baton.kvtransfer.frames import HEADER_BYTES, FrameWriter, covered
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.progress import KVReady, ReadCursor
from baton.types import BlockId, KVLayout, KVRange, LegId, TokenChunk, TransferStats
from baton.v1 import kv_pb2
from baton.wire_types import chunk_from_pb, chunk_to_pb
from baton.worker.effects import FetchKV
from tests.sim.world import Conn

if TYPE_CHECKING:
    from baton.kvtransfer.memory import KVMemory
    from tests.sim.worker import SimWorker

T = TypeVar("T")

SLOT_BYTES = 8
FRAME_BYTES = 24 * SLOT_BYTES  # so that most prompts take several frames
CREDIT = 4  # frames under way


class SimMemory:
    """What importer and exporter need of `KVMemory`, over a null runner's pool of integers."""

    def __init__(self, runner: NullRunner, layout: KVLayout) -> None:
        self.layout = layout
        self._runner = runner

    def num_bytes(self, where: KVRange) -> int:
        return where.num_layers * where.num_tokens * SLOT_BYTES

    def pack(
        self, block_ids: Sequence[BlockId], where: KVRange, headroom_bytes: int = 0
    ) -> memoryview:
        start, stop = where.token_start, where.token_stop
        values: list[int] = []
        for layer in range(where.layer_start, where.layer_stop):
            values += self._runner.export_kv(block_ids, start, stop, layer)
        frame = bytearray(headroom_bytes) + struct.pack(f"<{len(values)}q", *values)
        return memoryview(frame)

    def unpack(self, block_ids: Sequence[BlockId], where: KVRange, payload: memoryview) -> None:
        values = struct.unpack(f"<{where.num_layers * where.num_tokens}q", payload)
        for layer in range(where.layer_start, where.layer_stop):
            base = (layer - where.layer_start) * where.num_tokens
            layer_values = values[base : base + where.num_tokens]
            self._runner.import_kv(block_ids, where.token_start, layer_values, layer)

    def settle(self) -> None:
        pass  # written at once

    async def run(self, function: Any, *args: Any) -> Any:
        return function(*args)


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never really waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    raise AssertionError("it waits for something")


class Reader:
    """P's end of one fetch: asks the worker's machine, then reads blocks into frames."""

    def __init__(self, worker: "SimWorker", conn: Conn) -> None:
        self.worker = worker
        self.conn = conn
        self.key = 0
        self.fetch: FetchOpen | None = None
        self.leg: LegId | None = None
        self.epoch = 0
        self.block_ids: tuple[BlockId, ...] = ()
        self._ready = KVReady(0)
        self._first_tokens: tuple[TokenChunk, ...] | None = None
        self._writer: FrameWriter | None = None
        self._cursor: ReadCursor | None = None
        self._in_flight = 0
        self._ended = False
        self._stopping = False
        self._busy = False  # the transfer thread packs a frame
        self._swapped: bytes | None = None

    # from the consumer

    def received(self, message: Any) -> None:
        worker = self.worker
        match message:
            case ("open", fetch):
                self.fetch = fetch
                self.key = worker.next_key()
                worker.readers_by_key[self.key] = self
                worker.carry_out(worker.machine.attach(self.key, fetch, worker.world.now_ms))
            case ("ack", num_tokens):
                self._in_flight -= 1
                if self.epoch and not self._stopping:
                    worker.machine.attachment_progress(self.epoch, num_tokens, worker.world.now_ms)
                self._pump()
            case ("done",):
                worker.machine.attachment_done(self.epoch)

    def closed(self, reason: str) -> None:
        if self.epoch:
            self._stop()
        elif self.key in self.worker.readers_by_key:
            del self.worker.readers_by_key[self.key]
            self.worker.machine.cancel_attach(self.key)

    # from the machine

    def granted(self, grant: AttachGranted) -> None:
        del self.worker.readers_by_key[self.key]
        assert self.fetch is not None
        self.worker.passes("attach")
        self.leg, self.epoch, self.block_ids = grant.leg, grant.epoch, grant.block_ids
        self._ready, self._first_tokens = grant.ready, grant.first_tokens
        self._writer = FrameWriter(grant.epoch)
        if isinstance(self.fetch.source, HashChain):
            where = covered(self.fetch.range, grant.ready.num_tokens)
            self.fetch = replace(self.fetch, range=where)
        self._cursor = ReadCursor(self.fetch.range)
        self.worker.readers[self.epoch] = self
        self.conn.send(1, ("opened", self.epoch, self._ready.num_tokens))
        self._pump()

    def refused(self, cause: Cause, detail: str) -> None:
        del self.worker.readers_by_key[self.key]
        self.conn.send(1, ("failed", cause, detail))
        self.conn.close(1)

    def ready(self, ready: KVReady) -> None:
        assert ready.is_beyond(self._ready)
        self._ready = ready
        self._pump()

    def sampled(self, first_tokens: tuple[TokenChunk, ...]) -> None:
        self._first_tokens = first_tokens
        self._pump()

    def cut(self, cause: Cause, detail: str) -> None:
        self.conn.send(1, ("failed", cause, detail))
        self.conn.close(1)
        self._stop()

    def _pump(self) -> None:
        """Give the transfer thread the next frame, if there is one to make."""
        if self._busy or self._stopping or self._ended or not self.epoch:
            return
        assert self._cursor is not None
        has_data = self._cursor.next_span(self._ready) is not None
        has_end = self._cursor.is_complete and self._first_tokens is not None
        if self._in_flight >= CREDIT or not (has_data or has_end):
            return
        self._busy = True
        world = self.worker.world
        world.after(world.rng.random() * 0.5, self.worker, self._make_frame)

    def _make_frame(self) -> None:
        """On the transfer thread: it reads even when the attachment has been cut meanwhile."""
        assert self.fetch is not None
        assert self._writer is not None
        assert self._cursor is not None
        self._busy = False
        memory, cursor, stats = self.worker.memory, self._cursor, self.worker.fleet.stats
        span = cursor.next_span(self._ready)
        if span is not None:
            size = memory.layout.block_size
            part = next_parts(span, size, memory.num_bytes(span), FRAME_BYTES)[0]
            frame = self._writer.data(part, memory.pack(self.block_ids, part, HEADER_BYTES))
            cursor.took(part)
            stats.num_early_frames += part.token_stop > self._ready.num_tokens
        else:
            frame = self._writer.end(self.fetch.range, self._end_payload())
            self._ended = True
        if self._stopping:
            self._close()
            return
        self._in_flight += 1
        self.worker.passes("frame sent")
        data = b"".join(bytes(part) for part in frame)
        frames, self._swapped = self.worker.fleet.disturb(data, self._swapped)
        for each in frames:
            self.conn.send(1, ("frame", each, cursor.num_tokens))
        self._pump()

    def _end_payload(self) -> bytes:
        chunks = [chunk_to_pb(chunk) for chunk in self._first_tokens or ()]
        return kv_pb2.EndOfKV(first_tokens=chunks).SerializeToString()

    def _stop(self) -> None:
        """Closed as soon as the transfer thread does not read any more."""
        if not self._stopping:
            self._stopping = True
            if not self._busy:
                self._close()

    def _close(self) -> None:
        worker = self.worker
        self.conn.close(1)
        del worker.readers[self.epoch]
        worker.carry_out(worker.machine.attachment_closed(self.epoch, worker.world.now_ms))


class Writer:
    """D's end of one fetch: verifies frames and writes them into reserved blocks."""

    def __init__(self, worker: "SimWorker", order: FetchKV) -> None:
        self.worker = worker
        self.leg = order.leg
        self.block_ids = order.block_ids
        self._by_hash = isinstance(order.fetch.source, HashChain)
        self._importer = Importer(
            cast("KVMemory", worker.memory),
            order.block_ids,
            order.fetch.range,
            clock=lambda: worker.world.now / 1e3,
            takes_less=self._by_hash,
        )
        self._token_start = order.fetch.range.token_start
        self._frames: list[tuple[bytes, int]] = []
        self._busy = False
        self._failure: BatonError | None = None
        self._started = worker.world.now
        self.conn: Conn | None = None
        target = worker.fleet.worker_at(order.transports[0].address)
        if target is None or not target.is_alive:
            world = worker.world
            refused = BatonError(Cause.TRANSPORT_FAILED, "connection refused")
            world.after(world.delay(), worker, self._fail, refused)
            return
        self.conn = Conn(worker.world, (worker, target))
        self.conn.ends = [self, Reader(target, self.conn)]
        self.conn.send(0, ("open", order.fetch))

    def received(self, message: Any) -> None:
        match message:
            case ("opened", epoch, num_ready):
                self._importer.opened(epoch, num_ready)
            case ("frame", data, num_tokens):
                self._frames.append((data, num_tokens))
                self._next()
            case ("failed", cause, detail):
                self._fail(BatonError(cause, detail))

    def closed(self, reason: str) -> None:
        self._fail(BatonError(Cause.TRANSPORT_FAILED, reason))

    def cancel(self) -> None:
        self._fail(BatonError(Cause.CANCELLED, "cancelled"))

    def _next(self) -> None:
        if not self._busy and self._frames and self._failure is None:
            self._busy = True
            world = self.worker.world
            world.after(world.rng.random() * 0.5, self.worker, self._write)

    def _write(self) -> None:
        """On the transfer thread: a write that has begun is finished, whatever was decided."""
        self._busy = False
        self.worker.passes("frame")
        data, num_tokens = self._frames.pop(0)
        self.worker.check_writer(self)
        try:
            is_complete = finish(self._importer.frame(data))
        except BatonError as error:
            self._failure = self._failure or error
        if self._failure is not None:
            self._end()
            return
        worker = self.worker
        worker.machine.fetch_progress(self.leg, worker.world.now_ms)
        assert self.conn is not None
        self.conn.send(0, ("ack", num_tokens))
        if is_complete:
            self._complete()
        else:
            self._next()

    def _complete(self) -> None:
        worker, importer = self.worker, self._importer
        worker.passes("fetched")
        assert self.conn is not None
        self.conn.send(0, ("done",))
        self.conn.close(0)
        end = kv_pb2.EndOfKV.FromString(importer.end_payload or b"")
        chunks = [chunk_from_pb(chunk) for chunk in end.first_tokens]
        stats = TransferStats(
            "sim",
            importer.num_bytes,
            1,
            importer.valid_tokens - self._token_start,
            worker.world.now - self._started,
        )
        worker.fleet.stats.num_imports += not self._by_hash
        worker.fleet.stats.num_prefixes += self._by_hash and stats.num_tokens > 0
        worker.fleet.stats.num_bytes += importer.num_bytes
        del worker.writers[self.leg]
        worker.carry_out(worker.machine.fetch_ended(self.leg, stats, chunks, worker.world.now_ms))

    def _fail(self, error: BatonError) -> None:
        if self._failure is None:
            self._failure = error
            if not self._busy:
                self._end()

    def _end(self) -> None:
        worker, error = self.worker, self._failure
        assert error is not None
        if self.conn is not None:
            self.conn.close(0)
        worker.fleet.stats.num_failed_fetches += 1
        del worker.writers[self.leg]
        worker.carry_out(
            worker.machine.fetch_failed(
                self.leg,
                self._importer.valid_tokens,
                error.cause,
                error.message,
                worker.world.now_ms,
            )
        )
