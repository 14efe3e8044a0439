"""What a worker tells its engine. Plain data: the boundary could become a process boundary
unchanged.

A *leg* is one request on this worker. Life of a leg, by the command that opens it:

    AddPrefill   waiting → running (prefill) → held        until Release or Abort
                 waiting → waiting_for_kv (its prefix) → running … where one can be fetched; as
                 for AddLocal
    AddDecode    waiting_for_kv → running (recompute committed output, decode) → finished
    AddLocal     waiting → running (prefill, decode) → finished
    Share        held, beside the running leg whose blocks it holds, until Release or Abort

Commands are applied only between steps. `in_flight` on Abort and Release says that a transfer
thread may still read or write the leg's blocks: they go to quarantine and come back with Quiesced.
When the engine itself fails a leg whose block ids it has told (LegAdmitted of an AddPrefill,
KVReserved), it cannot know of readers and writers: those blocks go to quarantine too, and the
worker answers every LegFailed with Quiesced. A command for a leg that is gone is ignored.
"""

from dataclasses import dataclass

from baton.types import BlockHash, LegId, Request, TokenChunk


@dataclass(frozen=True, slots=True)
class AddPrefill:
    """Reserve blocks for the whole prompt at once, compute it, sample the first token of each open
    choice, hold.

    Never preempted once admitted. Committed output is not recomputed here; first tokens are sampled
    at output index 0 all the same (the gateway drops what it has committed).
    """

    leg: LegId
    request: Request
    num_fetch_tokens: int = 0  # so many prompt tokens may be fetched: see PrefixReserved


@dataclass(frozen=True, slots=True)
class AddDecode:
    """Pin this worker's own prefix hit, reserve the rest of the prompt and one growth block per
    open choice. The KV of the first `num_tokens` of `Request.shared_token_ids` will be written.

    Answered before the next step is computed by KVReserved, LegRefused (no room now) or LegFailed
    (can never fit).
    """

    leg: LegId
    request: Request
    num_tokens: int | None = None  # None: of the prompt


@dataclass(frozen=True, slots=True)
class AddLocal:
    """Prefill and decode here."""

    leg: LegId
    request: Request
    num_fetch_tokens: int = 0  # as in AddPrefill


@dataclass(frozen=True, slots=True)
class PrefixArrived:
    """Answers PrefixReserved: the writer has stopped, prompt tokens [0, valid_tokens) are verified.
    The leg computes the rest."""

    leg: LegId
    valid_tokens: int


@dataclass(frozen=True, slots=True)
class PinPrefix:
    """Own the blocks of the longest ready prefix of this chain, for a reader, until UnpinPrefix.
    Answered by PrefixPinned at the end of the step; what is being computed is not waited for."""

    pin: int
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class UnpinPrefix:
    pin: int


@dataclass(frozen=True, slots=True)
class Share:
    """Hold the KV that a running leg of the same request has in full blocks, for another worker to
    fetch. Nothing is computed or copied, and the leg runs on.

    Of `Request.shared_token_ids`: what several choices have in common is their prompt. Answered by
    LegAdmitted with everything ready, and no tokens after it; by LegRefused when there is no full
    block; by LegFailed (TOKENS_MISMATCH) when the leg runs other ids.
    """

    leg: LegId
    request: Request
    source: LegId


@dataclass(frozen=True, slots=True)
class Advance:
    """More output of a running leg was committed, by another worker: go on behind it. Ids at
    indices where this leg has its own must be the same, or it fails (TOKENS_MISMATCH)."""

    leg: LegId
    output_token_ids: tuple[tuple[int, ...], ...]  # as in Request


@dataclass(frozen=True, slots=True)
class KVImported:
    """The KV that was to be written is in the reserved blocks. `first_tokens` hold index 0 of each
    open choice (from the end frame) when that is the prompt's; for a choice with committed output
    the committed ids win."""

    leg: LegId
    first_tokens: tuple[TokenChunk, ...]


@dataclass(frozen=True, slots=True)
class KVFailed:
    """The writer has stopped; prompt tokens [0, valid_tokens) are verified. The leg keeps all its
    blocks and waits."""

    leg: LegId
    valid_tokens: int


@dataclass(frozen=True, slots=True)
class ComputeHere:
    """A leg that waits for KV computes what is missing itself, keeping its verified prefix.

    Its writer has stopped: KVFailed comes first unless nothing was ever written."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class Retain:
    """A held leg was read: keep its blocks as long as nobody needs them (evicted oldest first, told
    by LeaseEvicted)."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class Pin:
    """Undo Retain while another reader attaches. Answered by LegPinned (the reader may start), or
    by LeaseEvicted if the blocks were taken before."""

    leg: LegId


@dataclass(frozen=True, slots=True)
class Release:
    """A held leg is over."""

    leg: LegId
    in_flight: bool = False


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a leg in any state, or one of its choices. No event answers it. Unknown legs are
    ignored. The last choice takes its leg with it, except an AddPrefill leg, which is held until it
    is ended as a whole."""

    leg: LegId
    choice: int | None = None
    in_flight: bool = False


@dataclass(frozen=True, slots=True)
class Quiesced:
    """Whoever was reading or writing this leg's quarantined blocks has stopped. Nothing else lifts
    a quarantine; without one it is ignored."""

    leg: LegId


LegCommand = (
    AddPrefill
    | AddDecode
    | AddLocal
    | Share
    | Advance
    | PrefixArrived
    | KVImported
    | KVFailed
    | ComputeHere
    | Retain
    | Pin
    | Release
    | Abort
    | Quiesced
)
Command = LegCommand | PinPrefix | UnpinPrefix
