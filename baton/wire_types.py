"""baton.types to and from protobuf. See `baton.wire`, which is what everybody imports."""

from collections.abc import Sequence

from baton.sampling_params import MAX_LOGPROB_TOKEN_IDS
from baton.types import (
    FinishReason,
    KVGroup,
    KVKind,
    KVLayout,
    KVRange,
    KVTicket,
    LegId,
    Logprobs,
    Request,
    TokenChunk,
    TransferStats,
)
from baton.v1 import common_pb2 as pb
from baton.v1 import kv_pb2, worker_pb2
from baton.wire_checks import (
    DIGEST_BYTES,
    MAX_ADDRESS_LEN,
    MAX_ID_LEN,
    MAX_ITEMS,
    MAX_SALT_BYTES,
    MAX_TOKENS,
    MAX_TRACEPARENT_LEN,
    RANDOM_ID_BYTES,
    check_len,
    exactly,
    finite,
    refuse,
    text,
)
from baton.wire_sampling import sampling_from_pb, sampling_to_pb

_DTYPES = frozenset(("bfloat16", "float16", "float32"))


# ── requests and tokens ──────────────────────────────────────────────────────────────────────────


def leg_to_pb(leg: LegId) -> pb.LegId:
    return pb.LegId(request_id=leg.request_id, attempt=leg.attempt)


def leg_from_pb(message: pb.LegId) -> LegId:
    return LegId(text(message.request_id, MAX_ID_LEN, "request_id"), message.attempt)


def request_to_pb(request: Request) -> pb.Request:
    """Stop strings stay behind; request_id travels in the leg."""
    message = pb.Request(
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_to_pb(request.sampling),
        salt=request.salt,
        priority=request.priority,
        deadline_ms=request.deadline_ms,
        traceparent=request.traceparent,
    )
    if any(request.output_token_ids) or request.finished_choices:
        for choice in range(request.sampling.n):
            message.committed.add(
                token_ids=request.committed(choice), finished=choice in request.finished_choices
            )
    return message


def request_from_pb(message: pb.Request, request_id: str) -> Request:
    check_len(message.prompt_token_ids, MAX_TOKENS, "prompt_token_ids")
    check_len(message.salt, MAX_SALT_BYTES, "salt")
    check_len(message.traceparent, MAX_TRACEPARENT_LEN, "traceparent")
    sampling = sampling_from_pb(message.sampling)
    if len(message.committed) not in (0, sampling.n):
        raise refuse(f"committed has {len(message.committed)} entries for {sampling.n} choices")
    for committed in message.committed:
        check_len(committed.token_ids, MAX_TOKENS, "committed")
    outputs = tuple(tuple(committed.token_ids) for committed in message.committed)
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling,
        output_token_ids=outputs if any(outputs) else (),
        finished_choices=frozenset(c for c, x in enumerate(message.committed) if x.finished),
        salt=message.salt,
        priority=message.priority,
        deadline_ms=message.deadline_ms if message.HasField("deadline_ms") else None,
        traceparent=message.traceparent,
    )


def chunk_to_pb(chunk: TokenChunk) -> pb.TokenChunk:
    return pb.TokenChunk(
        leg=leg_to_pb(chunk.leg),
        choice=chunk.choice,
        start=chunk.start,
        token_ids=chunk.token_ids,
        logprobs=[_logprobs_to_pb(item) for item in chunk.logprobs],
        finish_reason=chunk.finish_reason or 0,  # type: ignore[arg-type]
        stop_token_id=chunk.stop_token_id,
    )


def chunk_from_pb(message: pb.TokenChunk) -> TokenChunk:
    ids, logprobs = message.token_ids, message.logprobs
    check_len(ids, MAX_TOKENS, "token_ids")
    if logprobs and len(logprobs) != len(ids):
        raise refuse("logprobs do not match token_ids")
    reason = message.finish_reason
    return TokenChunk(
        leg_from_pb(message.leg),
        message.choice,
        message.start,
        tuple(ids),
        tuple(map(_logprobs_from_pb, logprobs)) if logprobs else (),
        _finish_reason(reason) if reason else None,
        message.stop_token_id if message.HasField("stop_token_id") else None,
    )


def _logprobs_to_pb(logprobs: Logprobs) -> pb.Logprobs:
    top, asked = (
        [pb.TopLogprob(token_id=token_id, logprob=value) for token_id, value in pairs]
        for pairs in (logprobs.top, logprobs.asked)
    )
    return pb.Logprobs(logprob=logprobs.logprob, rank=logprobs.rank, top=top, asked=asked)


def _logprobs_from_pb(message: pb.Logprobs) -> Logprobs:
    check_len(message.top, MAX_ITEMS, "top logprobs")
    check_len(message.asked, MAX_LOGPROB_TOKEN_IDS, "asked logprobs")
    top, asked = (
        tuple((item.token_id, item.logprob) for item in items)
        for items in (message.top, message.asked)
    )
    return Logprobs(message.logprob, message.rank, top, asked)


def score_request_to_pb(request: Request) -> worker_pb2.ScoreRequest:
    return worker_pb2.ScoreRequest(request=request_to_pb(request))


def score_request_from_pb(message: worker_pb2.ScoreRequest) -> Request:
    request = request_from_pb(message.request, "")
    if request.sampling.prompt_logprobs is None:
        raise refuse("a score request without prompt_logprobs")
    return request


def score_reply_to_pb(start: int, logprobs: Sequence[Logprobs]) -> worker_pb2.ScoreReply:
    return worker_pb2.ScoreReply(start=start, logprobs=map(_logprobs_to_pb, logprobs))


def score_reply_from_pb(message: worker_pb2.ScoreReply) -> tuple[int, tuple[Logprobs, ...]]:
    check_len(message.logprobs, MAX_TOKENS, "logprobs")
    return message.start, tuple(map(_logprobs_from_pb, message.logprobs))


def _finish_reason(number: int) -> FinishReason:
    try:
        return FinishReason(number)
    except ValueError:
        raise refuse(f"finish_reason {number}") from None


# ── KV ───────────────────────────────────────────────────────────────────────────────────────────


def layout_to_pb(layout: KVLayout) -> pb.KVLayout:
    message = pb.KVLayout(block_size=layout.block_size, tp_size=layout.tp_size)
    for group in layout.groups:
        message.groups.add(
            kind=int(group.kind),
            num_layers=group.num_layers,
            num_kv_heads=group.num_kv_heads,
            head_dim=group.head_dim,
            dtype=group.dtype,
            window=group.window,
        )
    return message


def layout_from_pb(message: pb.KVLayout) -> KVLayout:
    check_len(message.groups, MAX_ITEMS, "groups")
    if not (message.groups and message.block_size and message.tp_size):
        raise refuse("layout without groups, block_size or tp_size")
    groups = tuple(_group_from_pb(group) for group in message.groups)
    return KVLayout(groups, message.block_size, message.tp_size)


def _group_from_pb(message: pb.KVGroup) -> KVGroup:
    try:
        kind = KVKind(message.kind)
    except ValueError:
        raise refuse(f"KV kind {message.kind}") from None
    if message.dtype not in _DTYPES:
        raise refuse(f"KV dtype {message.dtype[:16]!r}")
    if not (message.num_layers and message.num_kv_heads and message.head_dim):
        raise refuse("KV group without layers, heads or dims")
    return KVGroup(
        kind,
        message.num_layers,
        message.num_kv_heads,
        message.head_dim,
        message.dtype,
        message.window,
    )


def ticket_to_pb(ticket: KVTicket) -> pb.KVTicket:
    return pb.KVTicket(
        transfer_id=ticket.transfer_id,
        address=ticket.address,
        incarnation=ticket.incarnation,
        fingerprint=ticket.fingerprint,
        layout=layout_to_pb(ticket.layout),
        num_tokens=ticket.num_tokens,
        tokens_digest=ticket.tokens_digest,
        salt_digest=ticket.salt_digest,
        expires_at_ms=ticket.expires_at_ms,
        key_id=ticket.key_id,
        mac=ticket.mac,
    )


def ticket_from_pb(message: pb.KVTicket) -> KVTicket:
    return KVTicket(
        transfer_id=exactly(message.transfer_id, RANDOM_ID_BYTES, "transfer_id"),
        address=text(message.address, MAX_ADDRESS_LEN, "address"),
        incarnation=exactly(message.incarnation, RANDOM_ID_BYTES, "incarnation"),
        fingerprint=exactly(message.fingerprint, DIGEST_BYTES, "fingerprint"),
        layout=layout_from_pb(message.layout),
        num_tokens=message.num_tokens,
        tokens_digest=exactly(message.tokens_digest, DIGEST_BYTES, "tokens_digest"),
        salt_digest=exactly(message.salt_digest, DIGEST_BYTES, "salt_digest"),
        expires_at_ms=message.expires_at_ms,
        key_id=message.key_id,
        mac=exactly(message.mac, DIGEST_BYTES, "mac"),
    )


def range_to_pb(where: KVRange) -> kv_pb2.KVRange:
    return kv_pb2.KVRange(
        layer_start=where.layer_start,
        layer_stop=where.layer_stop,
        token_start=where.token_start,
        token_stop=where.token_stop,
        head_start=where.head_start,
        head_stop=where.head_stop,
    )


def range_from_pb(message: kv_pb2.KVRange) -> KVRange:
    where = KVRange(
        message.layer_start,
        message.layer_stop,
        message.token_start,
        message.token_stop,
        message.head_start,
        message.head_stop,
    )
    if where.num_layers < 0 or where.num_tokens < 0 or where.head_stop < where.head_start:
        raise refuse(f"{where} ends before it starts")
    return where


def stats_to_pb(stats: TransferStats) -> worker_pb2.TransferStats:
    return worker_pb2.TransferStats(
        transport=stats.transport,
        num_bytes=stats.num_bytes,
        num_frames=stats.num_frames,
        num_tokens=stats.num_tokens,
        duration_ms=stats.duration_ms,
        ready_bytes=stats.ready_bytes,
        ready_ms=stats.ready_ms,
    )


def stats_from_pb(message: worker_pb2.TransferStats) -> TransferStats:
    return TransferStats(
        transport=text(message.transport, MAX_ITEMS, "transport"),
        num_bytes=message.num_bytes,
        num_frames=message.num_frames,
        num_tokens=message.num_tokens,
        duration_ms=finite(message.duration_ms, "duration_ms"),
        ready_bytes=message.ready_bytes,
        ready_ms=finite(message.ready_ms, "ready_ms"),
    )
