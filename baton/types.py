"""The types that flow between rooms. Data only; standard library only; everything frozen."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple, NewType

from baton.pooling import PoolingInfo as PoolingInfo
from baton.sampling_params import RepetitionDetection as RepetitionDetection
from baton.sampling_params import SamplingParams as SamplingParams
from baton.sampling_params import StructuredKind as StructuredKind
from baton.sampling_params import StructuredOutput as StructuredOutput

BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)  # 32 bytes

HASH_TOKENS = 16  # granularity of prefix hashes; every worker's block size is a multiple
PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
FETCH_BY_HASH = "fetch-by-hash"  # capability: reads others' prefixes, and serves its own


class Role(StrEnum):
    """A worker's policy; every worker of a generating model can do everything."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    POOLING = "pooling"  # of a model that embeds or scores: no KV, no legs

    @property
    def can_prefill(self) -> bool:
        return self in (Role.PREFILL, Role.BOTH)

    @property
    def can_decode(self) -> bool:
        return self in (Role.DECODE, Role.BOTH)


class FinishReason(IntEnum):
    """Numbers are the wire's. STOP also covers EOS; a stop *string* is found by the gateway."""

    STOP = 1
    LENGTH = 2
    ABORT = 3
    REPETITION = 4  # SamplingParams.repetition_detection


class LegId(NamedTuple):
    """One request on one worker. The gateway mints attempts; a later one supersedes earlier
    ones."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id} (attempt {self.attempt})"


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
    traceparent: str = ""  # W3C; "" = not traced

    def committed(self, choice: int) -> tuple[int, ...]:
        return self.output_token_ids[choice] if self.output_token_ids else ()

    def open_choices(self) -> Iterator[int]:
        return (c for c in range(self.sampling.n) if c not in self.finished_choices)

    @property
    def shared_token_ids(self) -> tuple[int, ...]:
        """Known ids that every open choice has before its own: the prompt, and behind it the
        committed output if only one choice is open."""
        choices = tuple(self.open_choices())
        only = self.committed(choices[0]) if len(choices) == 1 else ()
        return self.prompt_token_ids + only


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one sampled token: its own log-probability and the most likely alternatives, best first.

    Natural log, of the model's distribution after penalties and before temperature and truncation.
    """

    logprob: float
    rank: int  # 1 = the most likely
    top: tuple[tuple[int, float], ...]  # (token id, logprob)
    asked: tuple[tuple[int, float], ...] = ()  # of SamplingParams.logprob_token_ids, in that order


class TokenChunk(NamedTuple):
    """Consecutive output tokens of one choice; the first has index `start`.

    A tuple, because one is made for every token: a frozen dataclass takes six times as long.
    """

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
    """How a worker's KV looks. Two layouts convert when everything but block_size is equal; see
    `baton.compat`."""

    groups: tuple[KVGroup, ...]
    block_size: int  # tokens; a multiple of HASH_TOKENS
    tp_size: int = 1  # of every worker of this version

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


NO_KV = KVLayout((), HASH_TOKENS)  # a pooling worker's


@dataclass(frozen=True, slots=True)
class KVTicket:
    """The right to fetch the KV of `num_tokens` tokens from the worker that holds them: of a
    prompt, or (see `Request.shared_token_ids`) of a request that it runs.

    Minted by P when all blocks are reserved; opaque to the gateway, checked by P on each
    fetch and by D against its own request. `mac` covers every other field (see
    `baton.kvtransfer.ticket`).
    """

    transfer_id: bytes  # 16 random bytes
    address: str  # of the producer's gRPC server, host:port
    incarnation: bytes  # 16 bytes
    fingerprint: bytes  # 32 bytes
    layout: KVLayout
    num_tokens: int
    tokens_digest: bytes  # SHA-256 of their ids as u32le
    salt_digest: bytes  # SHA-256 of the tenant salt
    expires_at_ms: int  # the producer's own monotonic clock; opaque to others
    key_id: int
    mac: bytes = b""


@dataclass(frozen=True, slots=True)
class TransportAddress:
    """One way to fetch from a worker: ("grpc", "10.0.0.5:9000"), ("ucx", "10.0.0.5:9100")."""

    name: str
    address: str

    def __str__(self) -> str:
        """For people: the worker's host:port, without what else a transport needs to know."""
        return self.address.partition("/")[0]


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
    pooling: PoolingInfo | None = None  # of a pooling worker


@dataclass(frozen=True, slots=True)
class LinkRate:
    """How fast KV comes to a worker over one transport, within its host or between hosts."""

    transport: str
    is_same_host: bool
    bytes_per_s: float


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
    link_rates: tuple[LinkRate, ...] = ()  # measured; of what is not there nothing is known


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
    ready_bytes: int = 0  # of num_bytes: what did not wait for the prefill
    ready_ms: float = 0.0  # until those were there: the link's own speed
