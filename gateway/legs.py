"""What a request machine is made of: its two legs, what it may ask and what it orders."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from baton.errors import Cause
from baton.gateway.commit import OutputLog
from baton.gateway.router import DecodeDecision, Need, Refusal, RouteDecision
from baton.messages import GatewayMessage, KvFailed
from baton.types import KVTicket, LegId, Request, TokenChunk, WorkerInfo

# Faults of the way, not of what was sent over it: the same ticket is worth a second fetch.
TRANSPORT_FAULTS = frozenset(
    {
        Cause.TRANSPORT_FAILED,
        Cause.TRANSFER_STALLED,
        Cause.FRAME_CORRUPT,
        Cause.FRAME_ORDER,
        Cause.FRAME_TRUNCATED,
        Cause.EPOCH_MISMATCH,
    }
)


@dataclass(frozen=True, slots=True)
class MachineConfig:
    slo_ttft_ms: float = float("inf")  # a request predicted to miss it is refused at the door
    queue_timeout_ms: float = 60_000.0  # waiting for room, in one stretch
    reroute_wait_ms: float = 10_000.0  # waiting for any worker, once something was computed
    retry_delay_ms: float = 500.0  # before a worker that failed a leg gets this request again
    max_failures: int = 8  # legs that failed for reasons that another try may cure
    max_deaths: int = 2  # workers lost while computing it: it may be what kills them
    acquittal_ms: float = 3_000.0  # for one of them to come back, before the request is blamed
    max_rebinds: int = 1


class Planner(Protocol):
    """What a request asks of the fleet as it is now. Fills `Need.hits`; reads only."""

    def plan(self, need: Need) -> RouteDecision | Refusal: ...

    def pick_decode(self, need: Need, source_id: str) -> DecodeDecision | Refusal: ...

    def local_ms(self, need: Need, worker_id: str, num_cached_tokens: int) -> float: ...

    def info(self, worker_id: str) -> WorkerInfo:
        """Of a worker that one of the above named."""
        ...


@dataclass(frozen=True, slots=True)
class Send:
    worker_id: str
    message: GatewayMessage


@dataclass(frozen=True, slots=True)
class TransferStarted:
    """A fetch was ordered: the link from `source` to `target` is about to carry this much."""

    leg: LegId
    source: str
    target: str
    num_bytes: int


class Emit(NamedTuple):
    """Newly committed tokens, for the client."""

    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class Ended:
    """The last effect of every request. `cause` is None when every choice is finished."""

    cause: Cause | None = None
    message: str = ""


Effect = Send | TransferStarted | Emit | Ended


class Phase(Enum):
    """Of a decode leg."""

    BINDING = "binding"
    IMPORTING = "importing"
    DECODING = "decoding"
    LOCAL = "local"


@dataclass(slots=True)
class PrefillLeg:
    leg: LegId
    info: WorkerInfo
    awaited: set[int]  # choices whose first token has not come from here yet
    ticket: KVTicket | None = None  # with Admitted
    left_ms: float = 0.0  # predicted at `as_of_ms`
    as_of_ms: float = 0.0
    is_void: bool = False  # the lease is lost, though a fetch may still be running

    @property
    def is_held(self) -> bool:
        return not self.awaited


@dataclass(slots=True)
class DecodeLeg:
    leg: LegId
    info: WorkerInfo
    phase: Phase
    num_bytes: int = 0  # to transfer
    num_rebinds: int = 0
    failed: KvFailed | None = None  # D waits for a decision


def need_of(
    request: Request, output: OutputLog, fingerprint: bytes | None, avoid: frozenset[str]
) -> Need:
    """What a request with an open choice still needs; the planner fills in the prefix hits."""
    lengths = [output.length(choice) for choice in output.open_choices]
    prompt_len, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens or 0
    return Need(
        prompt_len=prompt_len,
        num_choices=len(lengths),
        num_output_tokens=max(lengths),
        max_new_tokens=max(max_tokens - min(lengths), 1),
        total_len=prompt_len + max_tokens,
        fingerprint=fingerprint,
        avoid=avoid,
    )
