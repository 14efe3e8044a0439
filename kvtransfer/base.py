"""What a transport is: something that moves opaque frames, in order, from one producer to one
consumer.

A transport knows nothing of blocks, tickets or checksums. The producer side asks a `FrameSource`
(the exporter) for an attachment and pulls frames from it as fast as the consumer takes them; the
consumer side hands each frame to a `FrameSink` (the importer). Failure of either side ends the
fetch with a `BatonError` on both.

Guarantees every transport gives (tests/kvtransfer/test_transports.py runs them against each):
    order       frames reach the sink in the order the attachment yields them, each exactly once;
    bounded     at most `initial_credit` frames are between packing and the sink, whatever the
                sizes;
    cancel      cancelling `fetch` ends the producer's attachment at once, and the reverse;
    quiescence  when `fetch` returns or raises, nothing writes to the sink any more; when
    `Attachment.close` has been
                awaited, nothing reads the producer's blocks any more;
    told        whatever ends a fetch early is a BatonError with its Cause on the consumer, never
    silence.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from baton.errors import BatonError
from baton.grants import HashChain
from baton.types import KVLayout, KVRange, KVTicket, TransferStats, TransportAddress

if TYPE_CHECKING:  # what is here needs no torch
    from torch import Tensor

Buffers = Sequence[bytes | bytearray | memoryview]  # one frame, gathered: header, payload parts


@dataclass(frozen=True, slots=True)
class DeviceFrame:
    """A frame whose payload stays in device memory, beside its header."""

    header: bytes | memoryview
    payload: "Tensor"  # [num_bytes] uint8

    def __len__(self) -> int:
        return len(self.header) + len(self.payload)


Outgoing = Buffers | DeviceFrame
Incoming = bytes | memoryview | DeviceFrame


@dataclass(frozen=True, slots=True)
class Probe:
    """No KV: so many bytes of zeros, to measure the link."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class FetchOpen:
    """What a consumer asks for, and what it claims about itself (checked by the producer).

    `pace_ms` is what as many frames as `initial_credit` take at the measured rate of the link: the
    producer's patience with this consumer grows with it. 0 = that is nothing.

    By hash, `tokens_digest` is the last hash, and what comes may be less than `range`: FetchHave.
    """

    source: KVTicket | HashChain | Probe
    range: KVRange
    layout: KVLayout
    fingerprint: bytes
    tokens_digest: bytes
    salt_digest: bytes
    consumer: str
    initial_credit: int = 8
    pace_ms: int = 0
    traceparent: str = ""  # of the request; "" = not traced


class DeviceMemory(Protocol):
    """Where payloads lie that are not in host memory."""

    def buffer(self, num_bytes: int) -> "Tensor":
        """[num_bytes] uint8, undefined, that whatever moves frames may write at once. For any
        thread."""
        ...


class Staging(Protocol):
    """Where the producer puts frames together; its room is the consumer's credit, and what the
    producer may hold for all its consumers."""

    device: DeviceMemory | None  # data frames are `DeviceFrame`s with payloads from there

    async def take(self, max_frames: int, frame_bytes: int = 0) -> int:
        """Wait until there is room for at least one more frame, and use it up for at most
        `max_frames`. Returns how many.

        Args:
            frame_bytes: of the largest of them; 0 = too small to count.
        """
        ...

    def buffer(self, num_bytes: int) -> memoryview:
        """Writable memory for one frame. Callable from any thread, once per frame at most, in the
        order of the frames."""
        ...


class Attachment(Protocol):
    """Producer side of one fetch; created by `FrameSource.attach`."""

    epoch: int
    num_ready_tokens: int

    def frames(self, staging: Staging) -> AsyncGenerator[Outgoing, None]:
        """Frames as their KV becomes ready, the end frame last; each is put together only after
        `staging.take` had room for it. A yielded frame is a copy and stays valid as long as
        somebody holds it. Raises BatonError when the lease is lost."""
        ...

    async def failed(self) -> BatonError:
        """Returns when the lease is lost or the attachment was cut, also while the consumer gives
        no credit; otherwise never. Cancel it when the fetch is over."""
        ...

    def done(self) -> None:
        """The consumer has verified everything."""
        ...

    async def close(self) -> None:
        """The reader is gone; returns when nothing reads the blocks any more. Idempotent; always
        called."""
        ...


class FrameSource(Protocol):
    """Where attachments come from (`baton.kvtransfer.exporter`)."""

    async def attach(self, fetch: FetchOpen) -> Attachment:
        """Check the ticket and the consumer's claims and mint an epoch.

        Raises:
            BatonError: TICKET_*, *_MISMATCH, LEASE_UNKNOWN, LAYOUT_INCOMPATIBLE, DRAINING.
        """
        ...


class FrameSink(Protocol):
    """Where frames go (`baton.kvtransfer.importer`)."""

    def opened(self, epoch: int, num_ready_tokens: int) -> None:
        """The producer accepted; frames of this epoch follow."""
        ...

    async def frame(self, *frames: Incoming) -> bool:
        """Verify frames, in this order, and write their KV. True = the last was the end frame and
        everything is there. Their memory may be used for others afterwards.

        Raises:
            BatonError: FRAME_CORRUPT, FRAME_ORDER, FRAME_TRUNCATED, EPOCH_MISMATCH. The fetch ends
            with it.
        """
        ...

    def patience_s(self) -> float | None:
        """How long the next frame may take from now on; None while the sink waits for the producer
        to compute. Exceeded: TRANSFER_STALLED."""
        ...


class Transport(Protocol):
    name: str

    async def start(self, source: FrameSource) -> TransportAddress:
        """Serve fetches; the address goes into the worker's registration."""
        ...

    def reaches(self, peer: TransportAddress) -> bool:
        """Can this process use that address at all, as far as can be told without trying?"""
        ...

    async def fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        """Move frames from `peer` to `sink` until the sink has everything.

        Raises:
            BatonError: what the producer or the sink raised, TRANSPORT_FAILED, TRANSFER_STALLED.
            asyncio.CancelledError: cancelled; the producer has been told.
        """
        ...

    async def close(self) -> None:
        """Ends every fetch in both directions and frees sockets and memory. Idempotent."""
        ...
