"""Measuring a link before anything depends on it: frames of zeros, of no lease and no sequence.

A probe is a `KV.Fetch` like any other (same call, same transport, same credit), so what it measures
and warms up is what a hand-off will use. A producer serves one at a time, the next ones wait.
"""

import asyncio
import time
from collections.abc import AsyncGenerator

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import (
    Attachment,
    DeviceFrame,
    FetchOpen,
    FrameSource,
    Incoming,
    Outgoing,
    Probe,
    Staging,
    Transport,
)
from baton.kvtransfer.frames import unsealed
from baton.types import KVLayout, KVRange, TransferStats, TransportAddress

_MAX_BYTES = 16 << 20
_MAX_S = 10.0  # for a consumer that takes nothing
_MAX_WAITING = 16
_FRAME = bytes(1 << 20)
_NOTHING = bytes(32)


class ProbedSource:
    """A `FrameSource` that serves probes itself and leaves everything else to another."""

    def __init__(self, source: FrameSource) -> None:
        self._source = source
        self._turn = asyncio.Lock()
        self._num_probes = 0

    async def attach(self, fetch: FetchOpen) -> Attachment:
        if not isinstance(fetch.source, Probe):
            return await self._source.attach(fetch)
        if fetch.source.num_bytes > _MAX_BYTES:
            raise BatonError(Cause.PROTOCOL, f"a probe of {fetch.source.num_bytes} bytes")
        if self._num_probes > _MAX_WAITING:
            raise BatonError(Cause.OVERLOADED, "too many probes")
        self._num_probes += 1
        try:
            await self._turn.acquire()
        except BaseException:
            self._num_probes -= 1
            raise
        return _ProbeAttachment(self, fetch.source.num_bytes)

    def closed(self) -> None:
        self._num_probes -= 1
        self._turn.release()


class _ProbeAttachment:
    epoch = 0
    num_ready_tokens = 0

    def __init__(self, source: ProbedSource, num_bytes: int) -> None:
        self._source = source
        self._num_bytes = num_bytes
        self._is_closed = False

    async def frames(self, staging: Staging) -> AsyncGenerator[Outgoing, None]:
        # Not in one piece: of a slow link, what came in time tells how slow it is.
        frame_bytes = min(len(_FRAME), -(-self._num_bytes // 8))
        for start in range(0, self._num_bytes, frame_bytes):
            await staging.take(1)
            num_bytes = min(frame_bytes, self._num_bytes - start)
            if staging.device is None:
                yield (memoryview(_FRAME)[:num_bytes],)
            else:
                yield unsealed(staging.device.buffer(num_bytes))

    async def failed(self) -> BatonError:
        await asyncio.sleep(_MAX_S)
        return BatonError(Cause.TRANSFER_STALLED, "nobody takes the probe")

    def done(self) -> None:
        pass

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._source.closed()


class _Counter:
    """A sink that only counts."""

    def __init__(self, num_bytes: int) -> None:
        self._num_wanted = num_bytes
        self.num_bytes = 0
        self.num_frames = 0

    def opened(self, epoch: int, num_ready_tokens: int) -> None:
        pass

    async def frame(self, *frames: Incoming) -> bool:
        self.num_frames += len(frames)
        for frame in frames:
            self.num_bytes += len(frame.payload if isinstance(frame, DeviceFrame) else frame)
        return self.num_bytes >= self._num_wanted

    def patience_s(self) -> float | None:
        return None  # whoever probes has a timeout of its own


async def probe(
    transport: Transport,
    peer: TransportAddress,
    layout: KVLayout,
    consumer: str,
    num_bytes: int,
    timeout_s: float,
) -> TransferStats:
    """Have `num_bytes` sent from there to here, or what comes of them in time.

    Raises:
        BatonError: as `Transport.fetch`; UNSUPPORTED by producers of an earlier version.
        TimeoutError: nothing came in time.
    """
    fetch = FetchOpen(
        source=Probe(num_bytes),
        range=KVRange(0, layout.num_layers, 0, 0),
        layout=layout,
        fingerprint=_NOTHING,
        tokens_digest=_NOTHING,
        salt_digest=_NOTHING,
        consumer=consumer,
    )
    counter, started_s = _Counter(num_bytes), time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            await transport.fetch(peer, fetch, counter)
    except TimeoutError:
        if not counter.num_bytes:
            raise
    duration_ms = (time.monotonic() - started_s) * 1e3
    return TransferStats(
        transport.name, counter.num_bytes, counter.num_frames, duration_ms=duration_ms
    )
