"""Builders for the routing side's tests."""

import hashlib

from baton.gateway.workers import Fleet, Worker
from baton.types import (
    KVGroup,
    KVKind,
    KVLayout,
    KVTicket,
    Request,
    Role,
    SamplingParams,
    TransportAddress,
    WorkerInfo,
)

FINGERPRINT = hashlib.sha256(b"model").digest()


def layout(block_size: int = 16, num_layers: int = 2, dtype: str = "float32") -> KVLayout:
    group = KVGroup(KVKind.FULL, num_layers, num_kv_heads=2, head_dim=8, dtype=dtype)
    return KVLayout((group,), block_size)


def worker_info(
    worker_id: str,
    role: Role = Role.BOTH,
    *,
    num_blocks: int = 64,
    max_num_seqs: int = 16,
    fingerprint: bytes = FINGERPRINT,
    kv_layout: KVLayout | None = None,
    incarnation: int = 1,
    protocol: tuple[int, int] = (1, 0),
) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=hashlib.sha256(f"{worker_id}/{incarnation}".encode()).digest()[:16],
        role=role,
        model="tiny",
        fingerprint=fingerprint,
        layout=kv_layout or layout(),
        address=f"{worker_id}:1",
        transports=(TransportAddress("grpc", f"{worker_id}:1"),),
        host_id="host",
        pid=1,
        device="cpu",
        num_blocks=num_blocks,
        max_model_len=1024,
        max_num_seqs=max_num_seqs,
        vocab_size=256,
        eos_token_ids=(2,),
        protocol=protocol,
    )


def fleet_of(*infos: WorkerInfo) -> Fleet:
    fleet = Fleet()
    for info in infos:
        fleet.joined(info)
    return fleet


def worker(fleet: Fleet, worker_id: str) -> Worker:
    found = fleet.get(worker_id)
    assert found is not None
    return found


def request(
    num_prompt: int = 40,
    *,
    n: int = 1,
    max_tokens: int = 8,
    request_id: str = "r",
    deadline_ms: int | None = None,
) -> Request:
    sampling = SamplingParams(n=n, max_tokens=max_tokens, seed=1)
    prompt = tuple(range(100, 100 + num_prompt))
    return Request(request_id, prompt, sampling, deadline_ms=deadline_ms)


def ticket(info: WorkerInfo, num_tokens: int = 40) -> KVTicket:
    return KVTicket(
        transfer_id=b"t" * 16,
        address=info.address,
        incarnation=info.incarnation,
        fingerprint=info.fingerprint,
        layout=info.layout,
        num_tokens=num_tokens,
        tokens_digest=b"d" * 32,
        salt_digest=b"s" * 32,
        expires_at_ms=1,
        key_id=1,
        mac=b"m" * 32,
    )
