"""The types that flow between rooms. Data only; standard library only; everything frozen."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple, NewType

from baton.errors import InvalidRequest

BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)  # 32 bytes

HASH_TOKENS = 16  # granularity of prefix hashes; every worker's block size is a multiple
PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
SEED_BITS = 32


class Role(StrEnum):
    """A worker's policy; every worker can do everything."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def can_prefill(self) -> bool:
        return self is not Role.DECODE

    @property
    def can_decode(self) -> bool:
        return self is not Role.PREFILL


class FinishReason(IntEnum):
    """Numbers are the wire's. STOP also covers EOS; a stop *string* is found by the gateway."""

    STOP = 1
    LENGTH = 2
    ABORT = 3


class LegId(NamedTuple):
    """One request on one worker. The gateway mints attempts; a later one supersedes earlier
    ones."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What to sample and when to stop; vLLM's names, defaults and meanings.

    Raises:
        InvalidRequest: a value is out of range; `param` names the field.
    """

    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # the gateway (or LLM) draws one before a request leaves it
    max_tokens: int | None = (
        16  # None = up to the model's length; resolved before it leaves the gateway
    )
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()  # matched by the gateway (or LLM), never by the engine
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None  # number of alternatives besides the sampled token; None = none

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        _check(isinstance(self.n, int) and 1 <= self.n <= 128, "n", "must be in 1..128")
        _check(
            _finite(self.temperature) and 0 <= self.temperature <= 100,
            "temperature",
            "must be in 0..100",
        )
        _check(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        _check(self.top_k >= -1, "top_k", "must be -1 or 0 (off) or positive")
        _check(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "must be in 0..1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_finite(value) and -2 <= value <= 2, name, "must be in -2..2")
        value = self.repetition_penalty
        _check(_finite(value) and 0 < value <= 100, "repetition_penalty", "must be in (0, 100]")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _check(self.min_tokens >= 0, "min_tokens", "must be at least 0")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            "must not exceed max_tokens",
        )
        _check(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "must be in 0..20")
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits")

    def choice_seed(self, choice: int) -> int:
        """The 32-bit seed of one choice: a fixed function of (seed, choice), so that every worker
        agrees."""
        assert self.seed is not None, "a seed is drawn by the gateway"
        digest = hashlib.sha256(
            b"baton-seed-1"
            + self.seed.to_bytes(8, "little", signed=True)
            + choice.to_bytes(4, "little")
        )
        return int.from_bytes(digest.digest()[:4], "little")


def _finite(value: float) -> bool:
    return not isinstance(value, bool) and math.isfinite(value)


def _check(ok: bool, param: str, rule: str) -> None:
    if not ok:
        raise InvalidRequest(f"{param} {rule}", param)


@dataclass(frozen=True, slots=True)
class Request:
    """A request as workers see it: token ids in, token ids out. Start, resume, retry and migration
    are the same request with more committed output.

    `output_token_ids[c]` are the ids of choice c that the gateway has committed (emitted or
    buffered in order); `finished_choices` need no more tokens. Penalties, min/max tokens and
    sampling positions count from these.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[tuple[int, ...], ...] = ()  # () = nothing committed for any choice
    finished_choices: frozenset[int] = frozenset()
    salt: bytes = b""  # tenant ‖ cache_salt ‖ adapter, length-prefixed; roots the prefix hashes
    priority: int = 0  # lower runs first
    deadline_ms: int | None = None  # what is left when sent; a duration, never a time of day

    def committed(self, choice: int) -> tuple[int, ...]:
        return self.output_token_ids[choice] if self.output_token_ids else ()

    def open_choices(self) -> Iterator[int]:
        return (c for c in range(self.sampling.n) if c not in self.finished_choices)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one sampled token: its own log-probability and the most likely alternatives, best first.

    Natural log, of the model's distribution after penalties and before temperature and truncation.
    """

    logprob: float
    rank: int  # 1 = the most likely
    top: tuple[tuple[int, float], ...]  # (token id, logprob)


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive output tokens of one choice; the first has index `start`."""

    leg: LegId
    choice: int
    start: int
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()  # empty, or one per token
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the EOS or stop id that ended it; also the last of token_ids


class KVKind(IntEnum):
    FULL = 1
    WINDOW = 2
    LATENT = 3
    STATE = 4


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV has the same shape."""

    kind: KVKind
    num_layers: int
    num_kv_heads: int  # of the whole model, before tensor parallelism
    head_dim: int
    dtype: str  # "bfloat16" | "float16" | "float32"
    window: int = 0  # tokens; 0 = unlimited


_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a worker's KV looks. Two layouts convert when everything but block_size and tp_size is
    equal."""

    groups: tuple[KVGroup, ...]
    block_size: int  # tokens; a multiple of HASH_TOKENS
    tp_size: int = 1

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in all layers."""
        return sum(
            g.num_layers * 2 * g.num_kv_heads * g.head_dim * _DTYPE_BYTES[g.dtype]
            for g in self.groups
        )

    @property
    def num_layers(self) -> int:
        return sum(g.num_layers for g in self.groups)


@dataclass(frozen=True, slots=True)
class KVTicket:
    """The right to fetch the KV of `num_tokens` prompt tokens from the worker that holds them.

    Minted by P when all prompt blocks are reserved; opaque to the gateway, checked by P on each
    fetch and by D against its own request. `mac` covers every other field (see
    `baton.kvtransfer.ticket`).
    """

    transfer_id: bytes  # 16 random bytes
    address: str  # of the producer's gRPC server, host:port
    incarnation: bytes  # 16 bytes
    fingerprint: bytes  # 32 bytes
    layout: KVLayout
    num_tokens: int
    tokens_digest: bytes  # SHA-256 of all prompt ids as u32le
    salt_digest: bytes  # SHA-256 of the tenant salt
    expires_at_ms: int  # the producer's own monotonic clock; opaque to others
    key_id: int
    mac: bytes = b""


@dataclass(frozen=True, slots=True)
class TransportAddress:
    """One way to fetch from a worker: ("grpc", "10.0.0.5:9000"), ("ucx", "10.0.0.5:9100")."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker registers; constant for one incarnation except the role."""

    worker_id: str
    incarnation: bytes  # 16 random bytes, new at every process start
    role: Role
    model: str  # the name it serves
    fingerprint: bytes
    layout: KVLayout
    address: str  # gRPC, host:port
    transports: tuple[TransportAddress, ...]  # in order of preference
    host_id: str  # equal on workers that share memory
    pid: int
    device: str
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int  # width of the logits
    eos_token_ids: tuple[int, ...]
    capabilities: frozenset[str] = frozenset()
    protocol: tuple[int, int] = (PROTOCOL_MAJOR, PROTOCOL_MINOR)


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """A worker's load, taken between two engine steps."""

    role: Role
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_kv: int = 0
    free_blocks: int = 0  # free or evictable
    total_blocks: int = 0
    num_leases: int = 0
    num_quarantined_blocks: int = 0
    queued_prefill_tokens: int = 0  # not yet computed, of waiting and running prefills
    context_tokens: int = 0  # of running decodes
    step_age_ms: float = 0.0  # for how long the present step has been running
    draining: bool = False


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One engine step, for the latency model: what it did and how long it took."""

    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0  # context that the prefill tokens attended to
    num_decodes: int = 0
    context_tokens: int = 0
    duration_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class KVRange:
    """Half-open ranges that a frame, a fetch or a ready mark covers. Heads 0..0 = all KV heads."""

    layer_start: int
    layer_stop: int
    token_start: int
    token_stop: int
    head_start: int = 0
    head_stop: int = 0

    @property
    def num_tokens(self) -> int:
        return self.token_stop - self.token_start

    @property
    def num_layers(self) -> int:
        return self.layer_stop - self.layer_start


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one fetch moved."""

    transport: str
    num_bytes: int = 0
    num_frames: int = 0
    num_tokens: int = 0
    duration_ms: float = 0.0
    attributes: dict[str, str] = field(default_factory=dict)
