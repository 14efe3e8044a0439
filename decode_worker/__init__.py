"""The decode role: fetches prompts' KV and runs continuous batching on it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baton.config import WorkerConfig


def run(config: "WorkerConfig") -> int:
    """Serve until a signal; returns the exit status."""
    from baton.decode_worker.policy import decode_policy
    from baton.worker.main import run as run_worker

    return run_worker(config, decode_policy(config))
