"""What workers say of themselves, to and from protobuf. See `baton.wire`, which is what everybody
imports."""

from baton.totals import STEP_TOKENS, WorkerTotals
from baton.types import (
    NO_KV,
    LinkRate,
    Role,
    StepTiming,
    TransportAddress,
    WorkerInfo,
    WorkerSnapshot,
)
from baton.v1 import common_pb2 as pb
from baton.v1 import worker_pb2
from baton.wire_checks import (
    DIGEST_BYTES,
    MAX_ADDRESS_LEN,
    MAX_ID_LEN,
    MAX_ITEMS,
    RANDOM_ID_BYTES,
    check_len,
    exactly,
    finite,
    refuse,
    text,
)
from baton.wire_pooling import pooling_info_from_pb, pooling_info_to_pb
from baton.wire_types import layout_from_pb, layout_to_pb

_ROLES: dict[pb.Role, Role] = {
    pb.ROLE_PREFILL: Role.PREFILL,
    pb.ROLE_DECODE: Role.DECODE,
    pb.ROLE_BOTH: Role.BOTH,
    pb.ROLE_POOLING: Role.POOLING,
}
_ROLES_PB = {role: number for number, role in _ROLES.items()}


def transport_to_pb(address: TransportAddress) -> pb.TransportAddress:
    return pb.TransportAddress(name=address.name, address=address.address)


def transport_from_pb(message: pb.TransportAddress) -> TransportAddress:
    return TransportAddress(
        text(message.name, MAX_ITEMS, "transport"),
        text(message.address, MAX_ADDRESS_LEN, "transport address"),
    )


def role_from_pb(number: pb.Role) -> Role:
    try:
        return _ROLES[number]
    except KeyError:
        raise refuse(f"role {number}") from None


def worker_info_to_pb(info: WorkerInfo) -> pb.WorkerInfo:
    pooling = None if info.pooling is None else pooling_info_to_pb(info.pooling)
    return pb.WorkerInfo(
        worker_id=info.worker_id,
        incarnation=info.incarnation,
        role=_ROLES_PB[info.role],
        model=info.model,
        fingerprint=info.fingerprint,
        layout=layout_to_pb(info.layout),
        address=info.address,
        transports=[transport_to_pb(address) for address in info.transports],
        host_id=info.host_id,
        pid=info.pid,
        device=info.device,
        num_blocks=info.num_blocks,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        capabilities=sorted(info.capabilities),
        protocol_major=info.protocol[0],
        protocol_minor=info.protocol[1],
        pooling=pooling,
    )


def worker_info_from_pb(message: pb.WorkerInfo) -> WorkerInfo:
    for field in ("transports", "eos_token_ids", "capabilities"):
        check_len(getattr(message, field), MAX_ITEMS, field)
    role = role_from_pb(message.role)
    if (role is Role.POOLING) != message.HasField("pooling"):
        raise refuse("a pooling worker says what it computes, and nobody else")
    return WorkerInfo(
        worker_id=text(message.worker_id, MAX_ID_LEN, "worker_id"),
        incarnation=exactly(message.incarnation, RANDOM_ID_BYTES, "incarnation"),
        role=role,
        model=text(message.model, MAX_ADDRESS_LEN, "model"),
        fingerprint=exactly(message.fingerprint, DIGEST_BYTES, "fingerprint"),
        layout=NO_KV if role is Role.POOLING else layout_from_pb(message.layout),
        address=text(message.address, MAX_ADDRESS_LEN, "address"),
        transports=tuple(transport_from_pb(item) for item in message.transports),
        host_id=text(message.host_id, MAX_ID_LEN, "host_id"),
        pid=message.pid,
        device=text(message.device, MAX_ID_LEN, "device"),
        num_blocks=message.num_blocks,
        max_model_len=message.max_model_len,
        max_num_seqs=message.max_num_seqs,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        capabilities=frozenset(text(c, MAX_ID_LEN, "capability") for c in message.capabilities),
        protocol=(message.protocol_major, message.protocol_minor),
        pooling=pooling_info_from_pb(message.pooling) if role is Role.POOLING else None,
    )


def snapshot_to_pb(snapshot: WorkerSnapshot) -> pb.WorkerSnapshot:
    return pb.WorkerSnapshot(
        role=_ROLES_PB[snapshot.role],
        num_running=snapshot.num_running,
        num_waiting=snapshot.num_waiting,
        num_waiting_for_kv=snapshot.num_waiting_for_kv,
        free_blocks=snapshot.free_blocks,
        total_blocks=snapshot.total_blocks,
        num_leases=snapshot.num_leases,
        num_quarantined_blocks=snapshot.num_quarantined_blocks,
        queued_prefill_tokens=snapshot.queued_prefill_tokens,
        context_tokens=snapshot.context_tokens,
        step_age_ms=snapshot.step_age_ms,
        draining=snapshot.draining,
        link_rates=[
            pb.LinkRate(
                transport=rate.transport,
                same_host=rate.is_same_host,
                bytes_per_s=rate.bytes_per_s,
            )
            for rate in snapshot.link_rates
        ],
    )


def snapshot_from_pb(message: pb.WorkerSnapshot) -> WorkerSnapshot:
    check_len(message.link_rates, MAX_ITEMS, "link_rates")
    return WorkerSnapshot(
        role=role_from_pb(message.role),
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_waiting_for_kv=message.num_waiting_for_kv,
        free_blocks=message.free_blocks,
        total_blocks=message.total_blocks,
        num_leases=message.num_leases,
        num_quarantined_blocks=message.num_quarantined_blocks,
        queued_prefill_tokens=message.queued_prefill_tokens,
        context_tokens=message.context_tokens,
        step_age_ms=finite(message.step_age_ms, "step_age_ms"),
        draining=message.draining,
        link_rates=tuple(
            LinkRate(
                text(rate.transport, MAX_ID_LEN, "transport"),
                rate.same_host,
                finite(rate.bytes_per_s, "bytes_per_s"),
            )
            for rate in message.link_rates
        ),
    )


def timing_to_pb(timing: StepTiming) -> pb.StepTiming:
    return pb.StepTiming(
        num_prefill_tokens=timing.num_prefill_tokens,
        num_cached_tokens=timing.num_cached_tokens,
        num_decodes=timing.num_decodes,
        context_tokens=timing.context_tokens,
        duration_ms=timing.duration_ms,
    )


def timing_from_pb(message: pb.StepTiming) -> StepTiming:
    return StepTiming(
        num_prefill_tokens=message.num_prefill_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_decodes=message.num_decodes,
        context_tokens=message.context_tokens,
        duration_ms=finite(message.duration_ms, "duration_ms"),
    )


def totals_to_pb(totals: WorkerTotals) -> worker_pb2.WorkerTotals:
    return worker_pb2.WorkerTotals(
        num_preemptions=totals.num_preemptions,
        num_failed_fetches=totals.num_failed_fetches,
        num_expired_leases=totals.num_expired_leases,
        num_step_tokens=totals.num_step_tokens,
        steps_by_tokens=totals.steps_by_tokens,
    )


def totals_from_pb(message: worker_pb2.WorkerTotals) -> WorkerTotals:
    if len(message.steps_by_tokens) != len(STEP_TOKENS) + 1:
        raise refuse(f"steps_by_tokens has {len(message.steps_by_tokens)} counts")
    return WorkerTotals(
        num_preemptions=message.num_preemptions,
        num_failed_fetches=message.num_failed_fetches,
        num_expired_leases=message.num_expired_leases,
        num_step_tokens=message.num_step_tokens,
        steps_by_tokens=tuple(message.steps_by_tokens),
    )
