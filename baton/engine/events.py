"""What an engine tells its worker: StepOutputs, each handed over once. Plain data."""

from dataclasses import dataclass

from baton.errors import Cause
from baton.types import (
    BlockHash,
    BlockId,
    LegId,
    Logprobs,
    StepTiming,
    TokenChunk,
    WorkerSnapshot,
)


@dataclass(frozen=True, slots=True)
class LegAdmitted:
    """AddPrefill / AddLocal: blocks for the whole prompt are reserved. Share: blocks are held.

    `block_ids` cover tokens [0, num_tokens) in order; tokens [0, num_cached_tokens) are ready
    already.
    """

    leg: LegId
    block_ids: tuple[BlockId, ...]
    num_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """The KV of prompt tokens [0, tokens_done) is in the pool (all layers), for good."""

    leg: LegId
    tokens_done: int


@dataclass(frozen=True, slots=True)
class KVReserved:
    """AddDecode: `block_ids` cover tokens [0, num_tokens), which are to be written, and the rest of
    the prompt; tokens [0, num_cached_tokens) are this worker's own and ready."""

    leg: LegId
    block_ids: tuple[BlockId, ...]
    num_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixReserved:
    """AddPrefill / AddLocal with `num_fetch_tokens`: blocks for the whole prompt are reserved, and
    tokens [num_cached_tokens, num_fetch_tokens) are neither here nor being computed. The leg waits
    until PrefixArrived; then LegAdmitted follows. Whoever needs the same prefix waits with it."""

    leg: LegId
    block_ids: tuple[BlockId, ...]
    hashes: tuple[BlockHash, ...]  # of the prompt, from the root on
    num_cached_tokens: int
    num_fetch_tokens: int


@dataclass(frozen=True, slots=True)
class LegRefused:
    """No room now; nothing is held."""

    leg: LegId
    free_blocks: int


@dataclass(frozen=True, slots=True)
class LegFailed:
    """The leg is over. Blocks that a transfer may be touching (an admitted AddPrefill, a reserved
    AddDecode or prefix) are in quarantine until Quiesced; everything else it held is free."""

    leg: LegId
    cause: Cause
    detail: str


@dataclass(frozen=True, slots=True)
class LegTokens:
    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class LegScored:
    """AddLocal with `prompt_logprobs`: those of prompt tokens [start, start + len(logprobs)); the
    first event of a leg starts at 1, each other where the one before it ended."""

    leg: LegId
    start: int
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class LegPreempted:
    """A running leg lost its blocks and will recompute; for metrics."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class LegPinned:
    """Answers Pin: the leg's blocks are held again. Always one per Pin of a leg that was not
    evicted."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class LeaseEvicted:
    """A retained leg's blocks were taken."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class PrefixPinned:
    """Answers PinPrefix: the blocks of the first `num_tokens` tokens are held; perhaps none."""

    pin: int
    block_ids: tuple[BlockId, ...]
    num_tokens: int


LegEvent = (
    LegAdmitted
    | PrefixReserved
    | PrefillProgress
    | KVReserved
    | LegRefused
    | LegFailed
    | LegTokens
    | LegScored
    | LegPreempted
    | LegPinned
    | LeaseEvicted
)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Everything that happened since the previous StepOutput: one per step, and another before the
    step is computed when scheduling has something to tell (`timing` is None then).

    events: in order; per leg, LegAdmitted precedes PrefillProgress precedes LegTokens.
    stored, removed: prefix hashes (one per HASH_TOKENS tokens) that became reusable / were evicted.
    """

    events: tuple[LegEvent, ...]
    snapshot: WorkerSnapshot
    timing: StepTiming | None
    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    pinned: tuple[PrefixPinned, ...] = ()
