"""What a runner needs to know before it loads anything. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Everything about model, device and memory. Names are the command line's.

    `None` is decided by the runner, from the checkpoint and the machine.
    """

    model: str  # local directory or hub id
    revision: str | None = None
    load_format: str = "auto"  # "auto" | "safetensors" | "dummy" (random weights, config only)
    dtype: str = "auto"  # "auto" (as stored) | "bfloat16" | "float16" | "float32"
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:1"
    block_size: int = 16
    max_model_len: int | None = None  # None = what the model was trained for
    max_num_batched_tokens: int = 2048  # the largest step, for sizing CUDA workspaces
    max_num_seqs: int = 128
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = (
        0.9  # of the device's memory, weights and workspaces included; this process's
    )
    batch_invariant: bool | None = None
    enforce_eager: bool = False  # on CUDA: decode steps launch their kernels, no graphs
    hf_overrides: str | None = None  # JSON, over the checkpoint's config.json
    pooler_config: str | None = None  # JSON, of a pooling model; None = as its files say
    seed: int = 0  # of dummy weights
    show_progress: bool = True
