"""What the machine offers: device, dtype, and memory for the KV pool."""

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import torch

from baton.engine.runner_config import RunnerConfig
from baton.errors import InvalidRequest

log = logging.getLogger(__name__)

_MAX_CPU_POOL = 4 << 30  # bytes; pages are taken as blocks are used, so this is no cost up front
_CONTEXT_BYTES = 1 << 29  # of the device's memory, for CUDA and its libraries, as a rule
_CPU_POOL_SHARE = 4  # of the memory that is available: a host runs several workers


def select_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1" → a device with its index.

    Raises:
        InvalidRequest: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InvalidRequest(f"device {name} is not supported: cpu and cuda are", "device")
    index = device.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise InvalidRequest(f"device {name} is not available", "device")
    _check_toolchain()
    return torch.device("cuda", index)


def _check_toolchain() -> None:
    """
    Raises:
        InvalidRequest: the kernels cannot be compiled here.
    """
    if importlib.util.find_spec("triton") is None:
        raise InvalidRequest("on CUDA the package triton is needed", "device")
    # Triton compiles what launches its kernels, and looks for a compiler as here.
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        raise InvalidRequest("on CUDA a C compiler (gcc or clang) is needed", "device")


def describe_device(device: torch.device) -> str:
    """For the table that `baton serve` prints."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def select_dtype(name: str, stored_as: str | None, device: torch.device) -> torch.dtype:
    """The compute and KV dtype. "auto" = as stored; float32 where that is not said, or where the
    processor multiplies matrices of that dtype only by emulation (measured 7× slower)."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    stored: torch.dtype = getattr(torch, stored_as or "float32")
    if device.type == "cpu" and not multiplies(stored):
        log.info("this processor has no %s arithmetic: float32 is used", stored_as)
        return torch.float32
    return stored


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of that dtype itself."""
    mkldnn = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    return True


def num_kv_blocks(
    config: RunnerConfig,
    block_bytes: int,
    max_model_len: int,
    device: torch.device,
    workspace_bytes: int = 0,
) -> int:
    """How many blocks the pool gets, after the weights are in memory.

    Without `kv_cache_memory_bytes`: on CUDA what `gpu_memory_utilization` leaves beside what this
    process has taken already and the `workspace_bytes` of the largest step; on CPU a share of the
    available memory, at most what `max_num_seqs` sequences of full length need.

    Raises:
        InvalidRequest: not even one block fits.
    """
    blocks_per_seq = -(-max_model_len // config.block_size)
    if config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device) + _CONTEXT_BYTES
        allowed = int(total * config.gpu_memory_utilization) - own
        num_blocks = (min(allowed, free) - workspace_bytes) // block_bytes
    else:
        pool = min(available_memory() // _CPU_POOL_SHARE, _MAX_CPU_POOL)
        num_blocks = min(pool // block_bytes, config.max_num_seqs * blocks_per_seq)
    if num_blocks < 1:
        raise InvalidRequest(
            f"no room for a KV block of {block_bytes} bytes: raise kv_cache_memory_bytes",
            "kv_cache_memory_bytes",
        )
    return num_blocks


def available_memory() -> int:
    """Bytes that this process can still take: the host's, or what its cgroup leaves."""
    available = 0
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
