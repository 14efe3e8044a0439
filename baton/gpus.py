"""Which GPU each worker of `baton serve` gets. No torch: the supervisor never touches a device."""

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence

_QUERY = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
_PATIENCE_S = 10.0


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """Their names as CUDA_VISIBLE_DEVICES takes them: those that it lists, else all there are."""
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    try:
        done = subprocess.run(
            _QUERY, capture_output=True, text=True, timeout=_PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def assign_gpus(
    workers: Sequence[str], gpus: Sequence[str], utilization: float
) -> dict[str, dict[str, str]]:
    """Worker → its environment: one GPU each, in turn. Workers that share one share
    `utilization` (of its memory) too. Nothing where there is no GPU."""
    if not gpus:
        return {}
    placed = {worker: gpus[index % len(gpus)] for index, worker in enumerate(workers)}
    num_sharing = Counter(placed.values())
    return {
        worker: {
            "CUDA_VISIBLE_DEVICES": gpu,
            "BATON_GPU_MEMORY_UTILIZATION": str(utilization / num_sharing[gpu]),
        }
        for worker, gpu in placed.items()
    }
