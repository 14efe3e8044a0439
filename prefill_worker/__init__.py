"""The prefill role: computes prompts and holds their KV for others to fetch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baton.config import WorkerConfig


def run(config: "WorkerConfig") -> int:
    """Serve until a signal; returns the exit status."""
    from baton.prefill_worker.policy import prefill_policy
    from baton.worker.main import run as run_worker

    return run_worker(config, prefill_policy(config))
