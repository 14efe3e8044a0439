"""The producer side of a fetch: turns the KV of a lease into frames as it becomes ready.

    worker (lease table) ── ExportGate.attach ──► ExportFeed ── ready, end, cut ──► attachment
    attachment ── progress, done, closed ──► ExportGate

The gate decides who may read; the exporter reads. Everything here runs on the worker's event loop
except packing and checksums, which run on the transfer thread of `KVMemory`.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from baton.errors import BatonError, Cause
from baton.grants import HashChain
from baton.kvtransfer.base import FetchOpen, Outgoing, Staging
from baton.kvtransfer.frames import HEADER_BYTES, FrameWriter, covered
from baton.kvtransfer.progress import KVReady, ReadCursor
from baton.kvtransfer.turns import Turns
from baton.types import BlockId, KVRange

if TYPE_CHECKING:  # it needs torch; what is here does not
    from baton.kvtransfer.memory import KVMemory

FRAME_BYTES = 2 << 20
DEVICE_FRAME_BYTES = 4 << 20  # waiting for a device costs as much as copying half a MiB
BESIDE_FRAME_BYTES = 8 << 20  # or as moving ten within the device
# Packed at a time: going to the transfer thread and back costs as much as 100 KiB, and what is
# packed together leaves together.
_MAX_FRAMES, _MAX_PACKED_BYTES = 4, 4 << 20


class ExportFeed:
    """What one attachment may read, and how far it is computed. Made by the gate when it grants an
    attachment, fed by it from then on; event loop only."""

    def __init__(
        self,
        epoch: int,
        block_ids: Sequence[BlockId],
        ready: KVReady,
        end_payload: bytes | None = None,
    ) -> None:
        """
        Args:
            block_ids: cover the lease's tokens from 0 on, in order.
            ready: so much KV is in the blocks.
            end_payload: of the end frame; None until the prefill has sampled.
        """
        self.epoch = epoch
        self.block_ids = block_ids
        self.ready = ready
        self.end_payload = end_payload
        self.error: BatonError | None = None
        self._changed = asyncio.Event()

    def advance(self, ready: KVReady) -> None:
        """The prefill has come so far; going back is ignored."""
        if ready.is_beyond(self.ready):
            self.ready = ready
            self._notify()

    def end(self, payload: bytes) -> None:
        """The prefill is complete: the payload of the end frame."""
        self.end_payload = payload
        self._notify()

    def cut(self, error: BatonError) -> None:
        """Stop reading and tell the consumer why. The first error stands."""
        self.error = self.error or error
        self._notify()

    async def next_span(self, cursor: ReadCursor) -> KVRange:
        """What `cursor` has not taken yet, as soon as there is something.

        Raises:
            BatonError: the feed was cut.
        """
        while True:
            self.raise_if_cut()
            span = cursor.next_span(self.ready)
            if span is not None:
                return span
            await self._changed.wait()

    async def ended(self) -> bytes:
        """The end payload, as soon as there is one.

        Raises:
            BatonError: the feed was cut.
        """
        while self.end_payload is None or self.error:
            self.raise_if_cut()
            await self._changed.wait()
        return self.end_payload

    async def failed(self) -> BatonError:
        """The error, once the feed is cut."""
        while self.error is None:
            await self._changed.wait()
        return self.error

    def raise_if_cut(self) -> None:
        """
        Raises:
            BatonError: the error that it was cut with.
        """
        if self.error is not None:
            raise self.error

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class ExportGate(Protocol):
    """Who may read what; implemented by the worker over its lease table."""

    async def attach(self, fetch: FetchOpen) -> ExportFeed:
        """Check ticket and claims, count a reader, mint an epoch. If it is cancelled, or raises,
        nothing is counted.

        Raises:
            BatonError: TICKET_*, *_MISMATCH, LEASE_UNKNOWN, LAYOUT_INCOMPATIBLE, DRAINING.
        """
        ...

    def progress(self, epoch: int, num_sent_tokens: int) -> None:
        """The consumer took everything up to token `num_sent_tokens`."""
        ...

    def done(self, epoch: int) -> None:
        """The consumer has verified everything."""
        ...

    def closed(self, epoch: int) -> None:
        """Nothing of this attachment reads the blocks any more. Once per granted epoch."""
        ...


class Exporter:
    """A `FrameSource` over one worker's KV."""

    def __init__(
        self, memory: "KVMemory", gate: ExportGate, frame_bytes: int | None = None
    ) -> None:
        self._memory = memory
        self._gate = gate
        self._frame_bytes = frame_bytes
        self._turns = Turns()

    async def attach(self, fetch: FetchOpen) -> "ExportAttachment":
        if not self._memory.has(fetch.range):
            raise BatonError(Cause.PROTOCOL, f"there is no such KV: {fetch.range}")
        feed = await self._gate.attach(fetch)
        where, by_hash = fetch.range, isinstance(fetch.source, HashChain)
        if by_hash:
            where = covered(where, feed.ready.num_tokens)
        return ExportAttachment(
            self._memory, self._gate, feed, where, self._frame_bytes, self._turns, by_hash
        )


class ExportAttachment:
    """One consumer reading one lease; an `Attachment`."""

    def __init__(
        self,
        memory: "KVMemory",
        gate: ExportGate,
        feed: ExportFeed,
        where: KVRange,
        frame_bytes: int | None,
        turns: Turns,
        yields: bool,
    ) -> None:
        self._memory = memory
        self._gate = gate
        self._turns = turns
        self._yields = yields
        self._feed = feed
        self._where = where
        self._frame_bytes = frame_bytes
        self._writer = FrameWriter(feed.epoch)
        self._reading = asyncio.Lock()
        self._is_closed = False
        self.epoch = feed.epoch
        self.num_ready_tokens = feed.ready.num_tokens

    async def frames(self, staging: Staging) -> AsyncGenerator[Outgoing, None]:
        cursor, stays = ReadCursor(self._where), staging.device is not None
        frame_bytes = self._frame_bytes or _frame_bytes(self._memory, stays)
        packed_bytes = _MAX_FRAMES * frame_bytes if stays else _MAX_PACKED_BYTES
        while not cursor.is_complete:
            parts = self._next_parts(await self._feed.next_span(cursor), frame_bytes)
            while parts:
                at_once = min(_MAX_FRAMES, packed_bytes // self._memory.num_bytes(parts[0]))
                num_frames = max(1, min(len(parts), at_once))
                most_bytes = max(map(self._memory.num_bytes, parts[:num_frames])) + HEADER_BYTES
                num_frames = await staging.take(num_frames, most_bytes)
                now, parts = parts[:num_frames], parts[num_frames:]
                for part, frame in zip(now, await self._read(now, staging), strict=True):
                    self._feed.raise_if_cut()
                    yield frame
                    cursor.took(part)
                    self._gate.progress(self.epoch, cursor.num_tokens)
        payload = await self._feed.ended()
        await staging.take(1)
        yield self._writer.end(self._where, payload)

    def _next_parts(self, span: KVRange, frame_bytes: int) -> list[KVRange]:
        """Of some whole runs of tokens out of `span`, as many as are packed at a time or a run
        more."""
        parts: list[KVRange] = []
        block_size = self._memory.layout.block_size
        while span.num_tokens and len(parts) < _MAX_FRAMES:
            num_bytes = self._memory.num_bytes(span)
            parts += next_parts(span, block_size, num_bytes, frame_bytes)
            span = replace(span, token_start=parts[-1].token_stop)
        return parts

    async def _read(self, parts: Sequence[KVRange], staging: Staging) -> list[Outgoing]:
        """Data frames. Under the lock, so that `close` can wait for it."""
        async with self._reading, self._turns.take(self._yields):
            self._feed.raise_if_cut()
            return await self._memory.run(self._pack, parts, staging)

    def _pack(self, parts: Sequence[KVRange], staging: Staging) -> list[Outgoing]:
        memory, block_ids = self._memory, self._feed.block_ids
        if staging.device is not None:
            assert memory.device is not None, "such a lane is offered for a pool on a device alone"
            packed = memory.device.pack_here(block_ids, parts, staging.device.buffer)
            return [
                self._writer.beside(part, payload, digest)
                for part, (payload, digest) in zip(parts, packed, strict=True)
            ]
        return [
            self._writer.data(part, memory.pack(block_ids, part, HEADER_BYTES, staging.buffer))
            for part in parts
        ]

    async def failed(self) -> BatonError:
        return await self._feed.failed()

    def done(self) -> None:
        self._gate.done(self.epoch)

    async def close(self) -> None:
        self._feed.cut(BatonError(Cause.CANCELLED, "the reader is gone"))
        async with self._reading:
            if not self._is_closed:
                self._is_closed = True
                self._gate.closed(self.epoch)


def _frame_bytes(memory: "KVMemory", stays_on_device: bool) -> int:
    if stays_on_device:
        return BESIDE_FRAME_BYTES
    return FRAME_BYTES if memory.device is None else DEVICE_FRAME_BYTES


def next_parts(span: KVRange, block_size: int, num_bytes: int, frame_bytes: int) -> list[KVRange]:
    """The next frames' ranges out of `span`, which is ready: one run of tokens, all layers of the
    span.

    As many whole blocks as fit in a frame with all layers; if not even one does, one block split by
    layers; if not even one layer of a block does, fewer tokens. Always at least one token of one
    layer. The first run may end at a block boundary early, so that all others start at one.

    Args:
        num_bytes: payload bytes of the whole span.
    """
    cell_bytes = num_bytes // (span.num_layers * span.num_tokens)  # one token, one layer
    fit_tokens = max(1, frame_bytes // (cell_bytes * span.num_layers))
    if fit_tokens < block_size:
        fit_tokens = max(1, min(block_size, frame_bytes // cell_bytes))
    stop = span.token_start + fit_tokens
    if stop < span.token_stop and stop // block_size > span.token_start // block_size:
        stop = stop // block_size * block_size
    stop = min(stop, span.token_stop)
    num_layers = max(1, frame_bytes // (cell_bytes * (stop - span.token_start)))
    return [
        replace(
            span,
            layer_start=layer,
            layer_stop=min(layer + num_layers, span.layer_stop),
            token_stop=stop,
        )
        for layer in range(span.layer_start, span.layer_stop, num_layers)
    ]
