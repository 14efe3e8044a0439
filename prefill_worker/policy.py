"""What makes a worker a prefill worker: numbers, nothing else. It decodes as well if it must."""

from baton.config import WorkerConfig
from baton.types import Role
from baton.worker.policy import WorkerPolicy


def prefill_policy(config: WorkerConfig) -> WorkerPolicy:
    """Most of the pool may be leased: blocks are wanted by nobody here but the next prompt."""
    return WorkerPolicy(
        role=Role.PREFILL,
        lease_watermark=config.lease_watermark,
        lease_idle_ms=config.lease_ms,
    )
