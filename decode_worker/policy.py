"""What makes a worker a decode worker: numbers, nothing else. It prefills as well if it must."""

from baton.config import WorkerConfig
from baton.types import Role
from baton.worker.policy import WorkerPolicy

LEASE_SHARE = 0.5  # running sequences grow into what leases leave


def decode_policy(config: WorkerConfig) -> WorkerPolicy:
    """Leases of its own (it computes for others when no prefill worker is up) stay small: a
    sequence that finds no block is preempted and computed again."""
    return WorkerPolicy(
        role=Role.DECODE,
        lease_watermark=LEASE_SHARE * config.lease_watermark,
        lease_idle_ms=config.lease_ms,
    )
