"""What a worker says of itself when it registers."""

import os
import re
import secrets
import socket
from pathlib import Path

from baton.config import WorkerConfig
from baton.engine.pooling_runner import PoolingRunner
from baton.engine.runner import ModelRunner
from baton.types import FETCH_BY_HASH, NO_KV, Role, TransportAddress, WorkerInfo

DEMO_NAME = "baton-demo"
CAPABILITIES = frozenset({FETCH_BY_HASH})


def describe_worker(
    config: WorkerConfig,
    role: Role,
    runner: ModelRunner,
    address: str,
    transports: tuple[TransportAddress, ...],
) -> WorkerInfo:
    model = runner.info
    return WorkerInfo(
        worker_id=config.worker_id or _default_worker_id(role, address),
        incarnation=secrets.token_bytes(16),
        role=role,
        model=config.served_model_name or config.model or DEMO_NAME,
        fingerprint=model.fingerprint,
        layout=runner.kv_cache.layout,
        address=address,
        transports=transports,
        host_id=host_id(),
        pid=os.getpid(),
        device=model.device,
        num_blocks=runner.kv_cache.num_blocks,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        capabilities=CAPABILITIES,
    )


def describe_pooling_worker(config: WorkerConfig, runner: PoolingRunner, port: int) -> WorkerInfo:
    """`port`: of its gRPC server."""
    model = runner.info
    address = f"{advertised_host(config)}:{port}"
    return WorkerInfo(
        worker_id=config.worker_id or _default_worker_id(Role.POOLING, address),
        incarnation=secrets.token_bytes(16),
        role=Role.POOLING,
        model=config.served_model_name or config.model or DEMO_NAME,
        fingerprint=model.fingerprint,
        layout=NO_KV,
        address=address,
        transports=(),
        host_id=host_id(),
        pid=os.getpid(),
        device=model.device,
        num_blocks=0,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=model.vocab_size,
        eos_token_ids=(),
        capabilities=frozenset({model.pooling.task.value}),
        pooling=model.pooling,
    )


def _default_worker_id(role: Role, address: str) -> str:
    name = f"{role}-{socket.gethostname()}-{address.rpartition(':')[2]}"
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:64]


def advertised_host(config: WorkerConfig) -> str:
    """Where others reach this worker; listening everywhere, the address this host's name has."""
    if config.advertise_host is not None:
        return config.advertise_host
    if config.worker_host not in ("0.0.0.0", "::"):
        return config.worker_host
    return socket.gethostbyname(socket.gethostname())


def host_id() -> str:
    """Equal in processes that can share memory: same boot, same IPC namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}/{Path('/proc/self/ns/ipc').stat().st_ino}"
