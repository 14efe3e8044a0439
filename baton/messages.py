"""The words of a Session, as plain data: what the gateway tells a worker and what a worker answers.

`baton.wire` turns them into protobuf and back; state machines and the simulator know only these.
Who may send what in which state is in docs/kv-exchange.md.
"""

from dataclasses import dataclass

from baton.errors import Cause
from baton.grants import Grant
from baton.totals import WorkerTotals
from baton.types import (
    BlockHash,
    KVTicket,
    LegId,
    Request,
    StepTiming,
    TokenChunk,
    TransferStats,
    TransportAddress,
    WorkerInfo,
    WorkerSnapshot,
)

# ── gateway → worker ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """Who holds a longer prefix of a prompt than the worker that is to compute it: it is predicted
    to be faster to fetch `grant.num_tokens` tokens from there."""

    worker_id: str
    transports: tuple[TransportAddress, ...]  # the source's, from its registration
    host_id: str  # the source's
    grant: Grant
    predicted_ms: float  # of the fetch
    deadline_ms: int  # from the start of the fetch: then compute what is missing; 0 = none


@dataclass(frozen=True, slots=True)
class Submit:
    """Prefill the prompt, hold its KV under a ticket, sample the first token of each open
    choice."""

    leg: LegId
    request: Request
    prefix: PrefixSource | None = None


@dataclass(frozen=True, slots=True)
class Bind:
    """Reserve blocks, fetch the prompt's KV with the ticket, recompute committed output, go on
    decoding."""

    leg: LegId
    request: Request
    ticket: KVTicket
    transports: tuple[TransportAddress, ...]  # the producer's, from its registration
    host_id: str  # the producer's


@dataclass(frozen=True, slots=True)
class Rebind:
    """After KvFailed: same leg, fetch what is missing with this ticket (the same one, or another
    producer's)."""

    leg: LegId
    ticket: KVTicket
    transports: tuple[TransportAddress, ...]
    host_id: str


@dataclass(frozen=True, slots=True)
class ComputeLocally:
    """Prefill and decode here. For a known leg: keep its verified prefix and compute the rest."""

    leg: LegId
    request: Request
    prefix: PrefixSource | None = None  # of a new leg


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a leg, or one of its choices. Unknown legs are ignored: the abort may have crossed the
    end."""

    leg: LegId
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """The request is over: P may forget the lease."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class Heartbeat:
    seq: int


GatewayMessage = Submit | Bind | Rebind | ComputeLocally | Abort | Release | Heartbeat

# ── worker → gateway ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of every session."""

    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class Queued:
    leg: LegId


@dataclass(frozen=True, slots=True)
class PrefixFetched:
    """How the fetch of a prefix ended."""

    num_tokens: int  # verified, and not computed
    cause: Cause | None = None  # why it ended early; then the rest is computed
    stats: TransferStats | None = None  # unless it ended early


@dataclass(frozen=True, slots=True)
class Admitted:
    """P: every prompt block is reserved. A local leg: it left the queue (no ticket).

    With `prefix`, one was fetched before, and `num_cached_tokens` includes what came.
    """

    leg: LegId
    num_cached_tokens: int
    ticket: KVTicket | None = None
    prefix: PrefixFetched | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """P: the first `tokens_done` prompt tokens have their KV."""

    leg: LegId
    tokens_done: int
    predicted_ms_left: float


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Refused for now; nothing is held for this leg."""

    leg: LegId
    free_blocks: int
    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class Bound:
    """D: blocks are reserved; the first `num_cached_tokens` came from its own prefix cache."""

    leg: LegId
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Imported:
    """D: the received ranges cover exactly what was reserved; the leg runs."""

    leg: LegId
    stats: TransferStats


@dataclass(frozen=True, slots=True)
class KvFailed:
    """D: the fetch ended early; the first `valid_tokens` are verified and kept. D waits for a
    decision."""

    leg: LegId
    valid_tokens: int
    cause: Cause
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The leg is over here; everything it held is free."""

    leg: LegId
    cause: Cause
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """P: the retained KV of this leg was evicted or expired; its ticket is void."""

    leg: LegId
    cause: Cause


LegMessage = (
    Queued
    | Admitted
    | Progress
    | NoRoom
    | Bound
    | Imported
    | KvFailed
    | Failed
    | LeaseLost
    | TokenChunk
)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Everything one engine step (or one I/O event between steps) has to say to one gateway, in
    order."""

    messages: tuple[LegMessage, ...]
    snapshot: WorkerSnapshot
    timing: StepTiming | None = None
    heartbeat_seq: int = 0  # > 0: this batch (also) answers or is a heartbeat
    totals: WorkerTotals | None = None  # with heartbeats


WorkerMessage = Hello | StepBatch

# ── prefix locality ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Hashes (one per HASH_TOKENS) whose KV became reusable, in chain order."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    hashes: tuple[BlockHash, ...]


LocalityEvent = BlocksStored | BlocksRemoved
