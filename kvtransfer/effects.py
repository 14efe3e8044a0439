"""What the state machines of the KV exchange ask for: plain data, carried out by the worker.

`baton.kvtransfer.lease` and `baton.kvtransfer.reservation` return these and do nothing themselves.
"""

from dataclasses import dataclass

from baton.errors import Cause
from baton.kvtransfer.progress import KVReady
from baton.types import BlockHash, BlockId, KVTicket, LegId, TokenChunk, TransportAddress

# ── of a lease (the side that computed the KV) ───────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class RetainLease:
    """To the engine: the blocks may be evicted from now on."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class PinLease:
    """To the engine: hold them again; answer with `pinned` or `evicted`."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class DropLease:
    """To the engine: the leg is over. `in_flight`: readers are still at it; QuiesceLease
    follows."""

    leg: LegId
    in_flight: bool


@dataclass(frozen=True, slots=True)
class QuiesceLease:
    """To the engine: nobody reads the quarantined blocks any more."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """To the gateway: the lease ended without its asking; the ticket is void."""

    leg: LegId
    cause: Cause


@dataclass(frozen=True, slots=True)
class AttachGranted:
    """To the reader that asked with `key`: an epoch, used once, and what there is to read.

    `first_tokens` is None until the prefill has sampled; then AttachmentSampled brings them.
    """

    key: int
    epoch: int
    leg: LegId | None  # None: a prefix by hash, pinned under `key`
    block_ids: tuple[BlockId, ...]  # cover prompt tokens [0, num_tokens) in order
    num_tokens: int
    ready: KVReady
    first_tokens: tuple[TokenChunk, ...] | None


@dataclass(frozen=True, slots=True)
class AttachRefused:
    key: int
    cause: Cause
    detail: str


@dataclass(frozen=True, slots=True)
class AttachmentReady:
    """To open readers: so much of the prompt's KV is in the blocks now."""

    epochs: tuple[int, ...]
    ready: KVReady


@dataclass(frozen=True, slots=True)
class AttachmentSampled:
    """To open readers: the prefill is complete; these are the first tokens."""

    epochs: tuple[int, ...]
    first_tokens: tuple[TokenChunk, ...]


@dataclass(frozen=True, slots=True)
class CutAttachment:
    """To a reader: stop, tell the consumer why, then report `closed`."""

    epoch: int
    cause: Cause
    detail: str


LeaseEffect = (
    RetainLease
    | PinLease
    | DropLease
    | QuiesceLease
    | LeaseEnded
    | AttachGranted
    | AttachRefused
    | AttachmentReady
    | AttachmentSampled
    | CutAttachment
)

# ── of a pin (a prefix that is read by hash) ─────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class PinPrefix:
    """To the engine: pin what is ready of this chain; answer with `pinned`."""

    key: int
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class UnpinPrefix:
    """To the engine: nobody reads it any more."""

    key: int


PinEffect = PinPrefix | UnpinPrefix | AttachGranted | AttachRefused | CutAttachment

# ── of a reservation (the side that fetches) ─────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class KVSource:
    """Where to fetch from: part of Bind and Rebind."""

    ticket: KVTicket
    transports: tuple[TransportAddress, ...]
    host_id: str


@dataclass(frozen=True, slots=True)
class StartFetch:
    """Fetch prompt tokens [token_start, num_tokens) into the blocks (perhaps none: then only the
    end frame). Ends in exactly one `fetch_ended` or `fetch_failed`, after the last write."""

    leg: LegId
    source: KVSource
    token_start: int
    num_tokens: int
    block_ids: tuple[BlockId, ...]  # cover prompt tokens [0, num_tokens) in order


@dataclass(frozen=True, slots=True)
class CancelFetch:
    """Stop it and report `fetch_failed` once nothing writes any more."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class ImportKV:
    """To engine and gateway: the KV is complete; the leg runs. Leaves the table."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class KeepVerified:
    """To the engine: the fetch ended early; prompt tokens [0, valid_tokens) are verified."""

    leg: LegId
    valid_tokens: int


@dataclass(frozen=True, slots=True)
class AskDecision:
    """To the gateway: the fetch ended early; Rebind, ComputeLocally or Abort?"""

    leg: LegId
    valid_tokens: int
    cause: Cause
    detail: str


@dataclass(frozen=True, slots=True)
class ComputeMissing:
    """To the engine: compute what is missing here. Leaves the table."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class DropReservation:
    """To the engine: the leg is over. `in_flight`: a writer is still at it; QuiesceReservation
    follows."""

    leg: LegId
    in_flight: bool


@dataclass(frozen=True, slots=True)
class QuiesceReservation:
    """To the engine: nobody writes the quarantined blocks any more."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class ReservationEnded:
    """To the gateway: the reservation ended without its asking."""

    leg: LegId
    cause: Cause
    detail: str


ReservationEffect = (
    StartFetch
    | CancelFetch
    | ImportKV
    | KeepVerified
    | AskDecision
    | ComputeMissing
    | DropReservation
    | QuiesceReservation
    | ReservationEnded
)
