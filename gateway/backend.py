"""The seam between the HTTP side of the gateway and its routing side.

The HTTP side (app, completions, chat, stream) turns a body into `Request`s, opens a
`RequestStream` for each and owns everything that has to do with text: detokenization, stop strings,
usage, SSE. The routing side (router, request machine, sessions) implements `Backend` and owns
everything that has to do with workers. Both run on one event loop; nothing here is thread-safe.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from baton.errors import Cause
from baton.messages import PrefixFetched
from baton.pooling import PoolingInfo, PoolingRequest
from baton.totals import NO_TOTALS, WorkerTotals
from baton.types import Logprobs, Request, Role, TokenChunk, TransferStats, WorkerSnapshot


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the HTTP side must know of the model to validate a request; from worker registrations.

    A fleet serves one model, possibly under several names: one entry for each. Where workers
    differ, the smallest `max_model_len` is given.
    """

    name: str
    max_model_len: int  # prompt + output tokens
    vocab_size: int  # width of the logits; every id a client sends must be below it
    eos_token_ids: tuple[int, ...]
    pooling: PoolingInfo | None = None  # of a model that embeds or scores, and generates nothing


class WorkerState(StrEnum):
    CONNECTING = "connecting"  # known to discovery, no session yet
    UP = "up"
    STUCK = "stuck"  # heartbeats come, steps do not
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the gateway sees it now."""

    worker_id: str
    role: Role
    state: WorkerState
    model: str
    pid: int
    address: str  # gRPC, host:port
    host_id: str
    device: str
    block_size: int  # tokens
    snapshot: WorkerSnapshot


@dataclass(frozen=True, slots=True)
class Moved:
    """By fetches that ended well."""

    num_transfers: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LinkView:
    """What went from one producer to one consumer so far; only links that were tried."""

    source: str  # worker_id of P
    target: str  # worker_id of D
    transport: str  # the one used last
    bytes_per_s: float | None  # smoothed, or of links like it; None = nothing is known of either
    moved: Mapping[str, Moved]  # by transport
    failures: Mapping[Cause, int] = field(default_factory=dict)  # fetches that ended early
    in_flight_bytes: int = 0  # expected of fetches under way
    is_measured: bool = True  # False: `bytes_per_s` is of links like it

    @property
    def num_transfers(self) -> int:
        return sum(moved.num_transfers for moved in self.moved.values())

    @property
    def num_bytes(self) -> int:
        return sum(moved.num_bytes for moved in self.moved.values())

    @property
    def num_failures(self) -> int:
        return sum(self.failures.values())


@dataclass(frozen=True, slots=True)
class PairConflict:
    """Two workers that are up and never hand over to each other."""

    source: str  # worker_id of P
    target: str  # worker_id of D
    cause: Cause
    reason: str


class Disaggregation(StrEnum):
    """What the requests that were served lately say."""

    NOT_EXPECTED = "not_expected"  # no pair of a prefill and a decode worker is up
    UNKNOWN = "unknown"  # too few requests since there is one
    HAPPENING = "happening"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class HandOvers:
    """See `Disaggregation`; the numbers are since the gateway's start."""

    state: Disaggregation = Disaggregation.NOT_EXPECTED
    num_remote_prefills: int = 0
    num_local_prefills: int = 0


@dataclass(frozen=True, slots=True)
class ClusterView:
    workers: tuple[WorkerView, ...] = ()
    links: tuple[LinkView, ...] = ()
    hand_overs: HandOvers = HandOvers()
    conflicts: tuple[PairConflict, ...] = ()
    is_redis_reachable: bool = False
    totals: WorkerTotals = NO_TOTALS  # of all workers, since this gateway heard of them
    num_parked: int = 0  # requests that wait here for room on a worker


class PrefillPath(StrEnum):
    """Where the prompt of a request was computed."""

    NONE = "none"  # nowhere yet
    REMOTE = "remote"  # on a prefill worker, its KV fetched by the decode worker
    LOCAL = "local"  # on the worker that decodes


class MigrationCause(StrEnum):
    """Why a running request changed its decode worker."""

    DRAIN = "drain"  # the worker was told to end
    REBALANCE = "rebalance"  # another one is predicted to be faster
    FAILURE = "failure"  # the worker was lost, or failed it


class MigrationResult(StrEnum):
    """How it went on. Live: MOVED, FAILED (it stayed), MOOT (it ended meanwhile). After a loss:
    ATTACHED, RECOMPUTED."""

    MOVED = "moved"
    FAILED = "failed"
    MOOT = "moot"
    ATTACHED = "attached"  # to KV that was there
    RECOMPUTED = "recomputed"


@dataclass(frozen=True, slots=True)
class Migration:
    """One attempt of a running request to change its decode worker."""

    cause: MigrationCause
    result: MigrationResult
    num_bytes: int = 0  # fetched from the worker it left


@dataclass(frozen=True, slots=True)
class RequestReport:
    """How a request went, so far; final once the stream ended or was aborted.

    `queue_ms` runs from `Backend.open` to the (first) Admitted, `prefill_ms` from there to the
    first committed token; both are 0 until their end is known, and lie within the time the HTTP
    side measures around them, which makes its split of TTFT add up.
    """

    path: PrefillPath = PrefillPath.NONE
    prefill_worker: str = ""
    decode_worker: str = ""
    num_cached_tokens: int = 0  # prompt tokens that no worker had to compute
    num_attempts: int = 0  # legs minted
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfers: tuple[TransferStats, ...] = field(default=())  # finished imports, in order
    failures: tuple[Cause, ...] = ()  # of legs and fetches, in order
    prefixes: tuple[PrefixFetched, ...] = field(default=())  # fetched by hash, and how that ended
    migrations: tuple[Migration, ...] = ()
    num_defects: int = 0  # chunks with another id at a committed index


class RequestStream(Protocol):
    """One open request. Every opened stream is either iterated to its end or aborted.

    Iteration yields committed tokens only: strictly in index order within a choice, each index
    once. It ends when every choice is finished, and raises `BatonError` when the request failed
    for good; whatever failed before and was recovered from is invisible here. Tokens that are not
    read yet are kept (at most what `max_tokens` allows for each choice), so a slow reader never
    holds up a worker; it is the reader's task to abort when its client has stopped reading.
    """

    def __aiter__(self) -> "RequestStream": ...

    async def __anext__(self) -> TokenChunk:
        """Cancelling the await loses no token.

        Raises:
            StopAsyncIteration: every choice is finished.
            BatonError: the request failed, or was aborted by the routing side.
        """
        ...

    def finish_choice(self, choice: int) -> None:
        """A stop string matched: this choice needs no more tokens. Chunks of it that are already
        kept may still be yielded. Idempotent."""
        ...

    def abort(self) -> None:
        """Drop the request everywhere. Never raises, never waits; legal in every state,
        idempotent; after it iteration ends without an error."""
        ...

    @property
    def report(self) -> RequestReport: ...


class Backend(Protocol):
    def models(self) -> tuple[ServedModel, ...]:
        """What the workers that are up serve; empty while there are none."""
        ...

    def ready(self) -> bool:
        """At least one route (prefill → decode, or a worker with both roles) has been proven by a
        tiny request and is still up, and the gateway is not draining."""
        ...

    def topology(self) -> ClusterView: ...

    async def score(self, request: Request) -> tuple[Logprobs, ...]:
        """Log-probabilities of prompt tokens 1, 2, … (the first has none), with
        `sampling.prompt_logprobs` alternatives each. From a worker that prefills, in bulk, beside
        the request itself, which comes without `prompt_logprobs`.

        Raises:
            BatonError: NO_WORKER, OVERLOADED, …; what one worker cannot, another has tried.
        """
        ...

    async def pool(self, model: str, request: PoolingRequest) -> tuple[bytes, ...]:
        """Embeddings or scores by that model, in the order of the inputs, which it can read.
        Cancelling it takes them from the workers' queues.

        Raises:
            BatonError: NO_WORKER, OVERLOADED, …; what one worker cannot, another has tried.
        """
        ...

    def open(self, request: Request) -> RequestStream:
        """Admit a request: plan its route and send it off, or put it into the bounded queue.

        `request.request_id` is unique (minted by the HTTP side, never the client's own words),
        `sampling.seed` and `sampling.max_tokens` are set, prompt + max_tokens fits the model.

        Raises:
            BatonError: NO_WORKER, OVERLOADED, DRAINING, NEVER_FITS; at once.
        """
        ...
