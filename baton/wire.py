"""Plain data to protobuf and back; protobuf objects live nowhere else than here and in servicers.

`*_to_pb` trusts its argument, which is ours. `*_from_pb` trusts nothing: lengths are bounded, enums
must be known and not UNSPECIFIED, numbers finite, digests of the right size.

Raises:
    BatonError(PROTOCOL): by every `*_from_pb`, for a message that no correct peer sends.
"""

from collections.abc import Callable

from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    Failed,
    GatewayMessage,
    Heartbeat,
    Hello,
    Imported,
    KvFailed,
    LeaseLost,
    LegMessage,
    NoRoom,
    PrefixSource,
    Progress,
    Queued,
    Rebind,
    Release,
    StepBatch,
    Submit,
    WorkerMessage,
)
from baton.types import LegId, TokenChunk, TransportAddress
from baton.v1 import common_pb2
from baton.v1 import worker_pb2 as pb
from baton.wire_checks import (
    DIGEST_BYTES,
    MAX_DETAIL_LEN,
    MAX_ID_LEN,
    MAX_ITEMS,
    MAX_TRACEPARENT_LEN,
    RANDOM_ID_BYTES,
    cause_from_pb,
    check_len,
    exactly,
    finite,
    refuse,
    text,
)
from baton.wire_prefix import (
    prefix_fetched_from_pb,
    prefix_fetched_to_pb,
    prefix_source_from_pb,
    prefix_source_to_pb,
)
from baton.wire_types import (
    chunk_from_pb,
    chunk_to_pb,
    layout_from_pb,
    layout_to_pb,
    leg_from_pb,
    leg_to_pb,
    range_from_pb,
    range_to_pb,
    request_from_pb,
    request_to_pb,
    score_reply_from_pb,
    score_reply_to_pb,
    score_request_from_pb,
    score_request_to_pb,
    stats_from_pb,
    stats_to_pb,
    ticket_from_pb,
    ticket_to_pb,
)
from baton.wire_workers import (
    snapshot_from_pb,
    snapshot_to_pb,
    timing_from_pb,
    timing_to_pb,
    totals_from_pb,
    totals_to_pb,
    transport_from_pb,
    transport_to_pb,
    worker_info_from_pb,
    worker_info_to_pb,
)

__all__ = [
    "DIGEST_BYTES",
    "MAX_DETAIL_LEN",
    "MAX_ID_LEN",
    "MAX_TRACEPARENT_LEN",
    "RANDOM_ID_BYTES",
    "cause_from_pb",
    "check_len",
    "chunk_from_pb",
    "chunk_to_pb",
    "exactly",
    "gateway_message_from_pb",
    "gateway_message_to_pb",
    "layout_from_pb",
    "layout_to_pb",
    "leg_from_pb",
    "leg_message_from_pb",
    "leg_message_to_pb",
    "leg_of_gateway_message",
    "leg_to_pb",
    "range_from_pb",
    "range_to_pb",
    "refuse",
    "score_reply_from_pb",
    "score_reply_to_pb",
    "score_request_from_pb",
    "score_request_to_pb",
    "text",
    "ticket_from_pb",
    "ticket_to_pb",
    "worker_info_from_pb",
    "worker_info_to_pb",
    "worker_message_from_pb",
    "worker_message_to_pb",
]

MAX_BATCH_MESSAGES = 1 << 16

# ── gateway → worker ─────────────────────────────────────────────────────────────────────────────


def gateway_message_to_pb(message: GatewayMessage) -> pb.GatewayMessage:
    match message:
        case Submit(leg, request, prefix):
            body = pb.Submit(leg=leg_to_pb(leg), request=request_to_pb(request))
            if prefix is not None:
                body.prefix.CopyFrom(prefix_source_to_pb(prefix))
            return pb.GatewayMessage(submit=body)
        case Bind(leg, request, ticket, transports, host_id):
            return pb.GatewayMessage(
                bind=pb.Bind(
                    leg=leg_to_pb(leg),
                    request=request_to_pb(request),
                    ticket=ticket_to_pb(ticket),
                    transports=[transport_to_pb(address) for address in transports],
                    host_id=host_id,
                )
            )
        case Rebind(leg, ticket, transports, host_id):
            return pb.GatewayMessage(
                rebind=pb.Rebind(
                    leg=leg_to_pb(leg),
                    ticket=ticket_to_pb(ticket),
                    transports=[transport_to_pb(address) for address in transports],
                    host_id=host_id,
                )
            )
        case ComputeLocally(leg, request, prefix):
            local = pb.ComputeLocally(leg=leg_to_pb(leg), request=request_to_pb(request))
            if prefix is not None:
                local.prefix.CopyFrom(prefix_source_to_pb(prefix))
            return pb.GatewayMessage(compute_locally=local)
        case Abort(leg, choice):
            return pb.GatewayMessage(abort=pb.Abort(leg=leg_to_pb(leg), choice=choice))
        case Release(leg):
            return pb.GatewayMessage(release=pb.Release(leg=leg_to_pb(leg)))
        case Heartbeat(seq):
            return pb.GatewayMessage(heartbeat=pb.Heartbeat(seq=seq))


def gateway_message_from_pb(message: pb.GatewayMessage) -> GatewayMessage:
    kind = message.WhichOneof("message")
    if kind is None:
        raise refuse("unknown gateway message")
    return _GATEWAY_MESSAGES[kind](getattr(message, kind))


def leg_of_gateway_message(message: pb.GatewayMessage) -> LegId | None:
    """Whom a malformed message was about, if that much of it can be read."""
    kind = message.WhichOneof("message")
    leg = getattr(getattr(message, kind), "leg", None) if kind else None
    if leg is None or not 0 < len(leg.request_id) <= MAX_ID_LEN:
        return None
    return leg_from_pb(leg)


def _submit(message: pb.Submit) -> Submit:
    leg = leg_from_pb(message.leg)
    return Submit(leg, request_from_pb(message.request, leg.request_id), _prefix(message))


def _prefix(message: pb.Submit | pb.ComputeLocally) -> PrefixSource | None:
    return prefix_source_from_pb(message.prefix) if message.HasField("prefix") else None


def _bind(message: pb.Bind) -> Bind:
    leg = leg_from_pb(message.leg)
    request = request_from_pb(message.request, leg.request_id)
    return Bind(leg, request, ticket_from_pb(message.ticket), *_producer(message))


def _rebind(message: pb.Rebind) -> Rebind:
    ticket = ticket_from_pb(message.ticket)
    return Rebind(leg_from_pb(message.leg), ticket, *_producer(message))


def _producer(message: pb.Bind | pb.Rebind) -> tuple[tuple[TransportAddress, ...], str]:
    check_len(message.transports, MAX_ITEMS, "transports")
    transports = tuple(transport_from_pb(address) for address in message.transports)
    return transports, text(message.host_id, MAX_ID_LEN, "host_id")


def _compute_locally(message: pb.ComputeLocally) -> ComputeLocally:
    leg = leg_from_pb(message.leg)
    return ComputeLocally(leg, request_from_pb(message.request, leg.request_id), _prefix(message))


def _abort(message: pb.Abort) -> Abort:
    choice = message.choice if message.HasField("choice") else None
    return Abort(leg_from_pb(message.leg), choice)


_GATEWAY_MESSAGES: dict[str, Callable[..., GatewayMessage]] = {
    "submit": _submit,
    "bind": _bind,
    "rebind": _rebind,
    "compute_locally": _compute_locally,
    "abort": _abort,
    "release": lambda message: Release(leg_from_pb(message.leg)),
    "heartbeat": lambda message: Heartbeat(message.seq),
}

# ── worker → gateway ─────────────────────────────────────────────────────────────────────────────


def worker_message_to_pb(message: WorkerMessage) -> pb.WorkerMessage:
    if isinstance(message, Hello):
        return pb.WorkerMessage(hello=pb.Hello(info=worker_info_to_pb(message.info)))
    return pb.WorkerMessage(
        step=pb.StepBatch(
            messages=[leg_message_to_pb(item) for item in message.messages],
            snapshot=snapshot_to_pb(message.snapshot),
            timing=None if message.timing is None else timing_to_pb(message.timing),
            heartbeat_seq=message.heartbeat_seq,
            totals=None if message.totals is None else totals_to_pb(message.totals),
        )
    )


def worker_message_from_pb(message: pb.WorkerMessage) -> WorkerMessage:
    kind = message.WhichOneof("message")
    if kind == "hello":
        return Hello(worker_info_from_pb(message.hello.info))
    if kind is None:
        raise refuse("unknown worker message")
    step = message.step
    check_len(step.messages, MAX_BATCH_MESSAGES, "messages")
    return StepBatch(
        messages=tuple(leg_message_from_pb(item) for item in step.messages),
        snapshot=snapshot_from_pb(step.snapshot),
        timing=timing_from_pb(step.timing) if step.HasField("timing") else None,
        heartbeat_seq=step.heartbeat_seq,
        totals=totals_from_pb(step.totals) if step.HasField("totals") else None,
    )


def leg_message_to_pb(message: LegMessage) -> pb.LegMessage:
    if isinstance(message, TokenChunk):  # nearly all of them
        return pb.LegMessage(tokens=chunk_to_pb(message))
    leg = leg_to_pb(message.leg)
    match message:
        case Queued():
            return pb.LegMessage(queued=pb.Queued(leg=leg))
        case Admitted(_, num_cached_tokens, ticket, prefix):
            body = pb.Admitted(leg=leg, num_cached_tokens=num_cached_tokens)
            if ticket is not None:
                body.ticket.CopyFrom(ticket_to_pb(ticket))
            if prefix is not None:
                body.prefix.CopyFrom(prefix_fetched_to_pb(prefix))
            return pb.LegMessage(admitted=body)
        case Progress(_, tokens_done, predicted_ms_left):
            return pb.LegMessage(
                progress=pb.Progress(
                    leg=leg, tokens_done=tokens_done, predicted_ms_left=predicted_ms_left
                )
            )
        case _:
            return _verdict_to_pb(message, leg)


def _verdict_to_pb(message: LegMessage, leg: common_pb2.LegId) -> pb.LegMessage:
    match message:
        case NoRoom(_, free_blocks, retry_after_ms):
            refusal = pb.NoRoom(leg=leg, free_blocks=free_blocks, retry_after_ms=retry_after_ms)
            return pb.LegMessage(no_room=refusal)
        case Bound(_, num_cached_tokens):
            return pb.LegMessage(bound=pb.Bound(leg=leg, num_cached_tokens=num_cached_tokens))
        case Imported(_, stats):
            return pb.LegMessage(imported=pb.Imported(leg=leg, stats=stats_to_pb(stats)))
        case KvFailed(_, valid_tokens, cause, detail):
            return pb.LegMessage(
                kv_failed=pb.KvFailed(
                    leg=leg,
                    valid_tokens=valid_tokens,
                    cause=int(cause),  # type: ignore[arg-type]
                    detail=detail[:MAX_DETAIL_LEN],
                )
            )
        case Failed(_, cause, detail):
            number: int = cause
            failed = pb.Failed(leg=leg, cause=number, detail=detail[:MAX_DETAIL_LEN])  # type: ignore[arg-type]
            return pb.LegMessage(failed=failed)
        case LeaseLost(_, cause):
            lost = pb.LeaseLost(leg=leg, cause=int(cause))  # type: ignore[arg-type]
            return pb.LegMessage(lease_lost=lost)
        case _:
            raise AssertionError(f"not a leg message: {type(message).__name__}")


def leg_message_from_pb(message: pb.LegMessage) -> LegMessage:
    kind = message.WhichOneof("message")
    if kind == "tokens":
        return chunk_from_pb(message.tokens)
    if kind is None:
        raise refuse("unknown leg message")
    body = getattr(message, kind)
    return _LEG_MESSAGES[kind](leg_from_pb(body.leg), body)


def _admitted(leg: LegId, message: pb.Admitted) -> Admitted:
    ticket = ticket_from_pb(message.ticket) if message.HasField("ticket") else None
    prefix = prefix_fetched_from_pb(message.prefix) if message.HasField("prefix") else None
    return Admitted(leg, message.num_cached_tokens, ticket, prefix)


def _progress(leg: LegId, message: pb.Progress) -> Progress:
    left = finite(message.predicted_ms_left, "predicted_ms_left")
    return Progress(leg, message.tokens_done, left)


def _kv_failed(leg: LegId, message: pb.KvFailed) -> KvFailed:
    check_len(message.detail, MAX_DETAIL_LEN, "detail")
    return KvFailed(leg, message.valid_tokens, cause_from_pb(message.cause), message.detail)


def _failed(leg: LegId, message: pb.Failed) -> Failed:
    check_len(message.detail, MAX_DETAIL_LEN, "detail")
    return Failed(leg, cause_from_pb(message.cause), message.detail)


_LEG_MESSAGES: dict[str, Callable[..., LegMessage]] = {
    "queued": lambda leg, _: Queued(leg),
    "admitted": _admitted,
    "progress": _progress,
    "no_room": lambda leg, message: NoRoom(leg, message.free_blocks, message.retry_after_ms),
    "bound": lambda leg, message: Bound(leg, message.num_cached_tokens),
    "imported": lambda leg, message: Imported(leg, stats_from_pb(message.stats)),
    "kv_failed": _kv_failed,
    "failed": _failed,
    "lease_lost": lambda leg, message: LeaseLost(leg, cause_from_pb(message.cause)),
}
