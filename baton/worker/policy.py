"""What distinguishes one worker from another: numbers and a role, switchable while it runs."""

from dataclasses import dataclass
from typing import Protocol

from baton.types import Role


@dataclass(frozen=True, slots=True)
class WorkerPolicy:
    role: Role = Role.BOTH
    lease_watermark: float = 0.8  # of all blocks; beyond it a prefill is refused with NoRoom
    lease_ttl_ms: int = 600_000  # of a ticket; the gateway releases long before
    lease_idle_ms: int = 30_000  # how long complete KV that nobody reads stays out of eviction
    attachment_stall_ms: int = 5_000  # how long a consumer may leave ready KV untaken
    fetch_stall_ms: int = 60_000  # how long a fetch may bring nothing, the producer computing
    decide_ms: int = 5_000  # how long a failed fetch waits for the gateway's decision
    session_timeout_ms: int = 2_500  # silence after which a gateway counts as dead
    retry_after_ms: int = 100  # at least, in NoRoom

    def __post_init__(self) -> None:
        if not 0 < self.lease_watermark <= 1:
            raise ValueError("lease_watermark must be in (0, 1]")


class PrefillPredictor(Protocol):
    """The part of `baton.latency.LatencyModel` that a worker asks."""

    def prefill_ms(self, num_uncached_tokens: int, num_cached_tokens: int = 0) -> float:
        """Time to prefill that many tokens after a cached prefix, alone on the worker."""
        ...
