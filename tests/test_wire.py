"""Every message survives the wire; nothing malformed comes in."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from baton import wire, wire_pooling
from baton.errors import BatonError, Cause
from baton.grants import Grant
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    Failed,
    Heartbeat,
    Hello,
    Imported,
    KvFailed,
    LeaseLost,
    NoRoom,
    PrefixFetched,
    PrefixSource,
    Progress,
    Queued,
    Rebind,
    Release,
    StepBatch,
    Submit,
)
from baton.pooling import PoolingInfo, PoolingInput, PoolingRequest, PoolingTask
from baton.totals import STEP_TOKENS, WorkerTotals
from baton.types import (
    NO_KV,
    FinishReason,
    KVGroup,
    KVKind,
    KVLayout,
    KVRange,
    KVTicket,
    LegId,
    LinkRate,
    Logprobs,
    RepetitionDetection,
    Request,
    Role,
    SamplingParams,
    StepTiming,
    StructuredKind,
    StructuredOutput,
    TokenChunk,
    TransferStats,
    TransportAddress,
    WorkerInfo,
    WorkerSnapshot,
)
from baton.v1 import common_pb2, worker_pb2

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
ids = st.lists(u32, max_size=5).map(tuple)
name = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
f32 = st.floats(width=32, allow_nan=False)
duration = st.floats(0, 1e12)
leg = st.builds(LegId, name, u32)
digest = st.binary(min_size=32, max_size=32)
random_id = st.binary(min_size=16, max_size=16)
one_up = st.integers(1, 2**32 - 1)
address = st.builds(TransportAddress, name, name)
transports = st.lists(address, max_size=3).map(tuple)
layout = st.builds(
    KVLayout,
    st.lists(
        st.builds(
            KVGroup,
            st.sampled_from(KVKind),
            one_up,
            one_up,
            one_up,
            st.sampled_from(["bfloat16", "float16", "float32"]),
            u32,
        ),
        min_size=1,
        max_size=2,
    ).map(tuple),
    one_up,
    one_up,
)
ticket = st.builds(
    KVTicket,
    random_id,
    name,
    random_id,
    digest,
    layout,
    u32,
    digest,
    digest,
    u64,
    u32,
    digest,
)
_full_sampling = st.builds(
    SamplingParams,
    n=st.integers(1, 3),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 1000),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 100),
    seed=st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.integers(100, 2**32 - 1),
    min_tokens=st.integers(0, 100),
    ignore_eos=st.booleans(),
    stop_token_ids=ids,
    logprobs=st.integers(0, 20),
    processed_logprobs=st.booleans(),
    logit_bias=st.dictionaries(u32, st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | st.lists(u32, min_size=1, max_size=3),
    bad_words_token_ids=st.lists(st.lists(u32, min_size=1, max_size=3), max_size=3),
    prompt_logprobs=st.none() | st.integers(0, 20),
    logprob_token_ids=st.lists(u32, max_size=3),
    repetition_detection=st.none()
    | st.builds(
        RepetitionDetection, st.integers(9, 1024), st.integers(0, 9), st.integers(2, 2**32 - 1)
    ),
    structured_outputs=st.none()
    | st.builds(
        StructuredOutput,
        st.sampled_from(sorted(set(StructuredKind) - {StructuredKind.JSON_OBJECT})),
        st.text(min_size=1, max_size=9),
        st.booleans(),
    ),
)
sampling = _full_sampling | _full_sampling.map(
    lambda params: replace(params, logprobs=None, logprob_token_ids=())
)


@st.composite
def requests(draw: st.DrawFn, request_id: str) -> Request:
    params = draw(sampling)
    outputs = draw(st.just(()) | st.tuples(*[ids] * params.n))
    return Request(
        request_id=request_id,
        prompt_token_ids=draw(ids),
        sampling=params,
        output_token_ids=outputs if any(outputs) else (),
        finished_choices=frozenset(draw(st.sets(st.integers(0, params.n - 1)))),
        salt=draw(st.binary(max_size=8)),
        priority=draw(st.integers(-(2**63), 2**63 - 1)),
        deadline_ms=draw(st.none() | u32),
    )


@st.composite
def with_request(draw: st.DrawFn, make: Callable[..., Any], *more: st.SearchStrategy[Any]) -> Any:
    leg_id = draw(leg)
    return make(leg_id, draw(requests(leg_id.request_id)), *map(draw, more))


@st.composite
def chunks(draw: st.DrawFn) -> TokenChunk:
    token_ids = draw(ids)
    tops = st.lists(st.tuples(u32, f32), max_size=2).map(tuple)
    logprobs = st.builds(Logprobs, f32, u32, tops, tops)
    return TokenChunk(
        leg=draw(leg),
        choice=draw(u32),
        start=draw(u32),
        token_ids=token_ids,
        logprobs=draw(st.just(()) | st.tuples(*[logprobs] * len(token_ids))),
        finish_reason=draw(st.none() | st.sampled_from(FinishReason)),
        stop_token_id=draw(st.none() | u32),
    )


grant = st.builds(
    Grant, random_id, random_id, random_id, digest, digest, digest, u32, u32, u32, digest
)
prefix = st.builds(PrefixSource, name, transports, name, grant, duration, u32)
gateway_message = st.one_of(
    with_request(Submit, st.none() | prefix),
    with_request(Bind, ticket, transports, name),
    st.builds(Rebind, leg, ticket, transports, name),
    with_request(ComputeLocally, st.none() | prefix),
    st.builds(Abort, leg, st.none() | u32),
    st.builds(Release, leg),
    st.builds(Heartbeat, u64),
)
cause = st.sampled_from(Cause)
stats = st.builds(TransferStats, name, u64, u32, u32, duration, u64, duration)
fetched = st.builds(PrefixFetched, u32, st.none() | cause, st.none() | stats)
leg_message = st.one_of(
    st.builds(Queued, leg),
    st.builds(Admitted, leg, u32, st.none() | ticket, st.none() | fetched),
    st.builds(Progress, leg, u32, duration),
    st.builds(NoRoom, leg, u32, u32),
    st.builds(Bound, leg, u32),
    st.builds(Imported, leg, stats),
    st.builds(KvFailed, leg, u32, cause, name),
    st.builds(Failed, leg, cause, name),
    st.builds(LeaseLost, leg, cause),
    chunks(),
)
_pooling = st.builds(
    PoolingInfo,
    st.sampled_from(PoolingTask),
    st.integers(1, 2**16),
    st.booleans(),
    st.lists(u32, max_size=3).map(tuple),
    st.booleans(),
)
_generating = st.builds(
    WorkerInfo,
    worker_id=name,
    incarnation=random_id,
    role=st.sampled_from(sorted(set(Role) - {Role.POOLING})),
    model=name,
    fingerprint=digest,
    layout=layout,
    address=name,
    transports=transports,
    host_id=name,
    pid=u32,
    device=name,
    num_blocks=u32,
    max_model_len=u32,
    max_num_seqs=u32,
    vocab_size=u32,
    eos_token_ids=ids,
    capabilities=st.frozensets(name, max_size=3),
    protocol=st.tuples(u32, u32),
)
info = _generating | st.builds(
    lambda made, pooling: replace(made, role=Role.POOLING, layout=NO_KV, pooling=pooling),
    _generating,
    _pooling,
)
snapshot = st.builds(
    WorkerSnapshot,
    st.sampled_from(Role),
    *[u32] * 9,
    step_age_ms=duration,
    draining=st.booleans(),
    link_rates=st.lists(st.builds(LinkRate, name, st.booleans(), duration), max_size=3).map(tuple),
)
per_bucket = st.tuples(*[u64] * (len(STEP_TOKENS) + 1))
batch = st.builds(
    StepBatch,
    st.lists(leg_message, max_size=3).map(tuple),
    snapshot,
    st.none() | st.builds(StepTiming, u32, u32, u32, u32, duration),
    u64,
    st.none() | st.builds(WorkerTotals, u64, u64, u64, u64, per_bucket),
)


@given(gateway_message)
def test_gateway_messages_survive(message: Any) -> None:
    data = wire.gateway_message_to_pb(message).SerializeToString()
    parsed = worker_pb2.GatewayMessage.FromString(data)
    assert wire.gateway_message_from_pb(parsed) == message
    assert wire.leg_of_gateway_message(parsed) == getattr(message, "leg", None)


@given(st.builds(Hello, info) | batch)
def test_worker_messages_survive(message: Any) -> None:
    data = wire.worker_message_to_pb(message).SerializeToString()
    assert wire.worker_message_from_pb(worker_pb2.WorkerMessage.FromString(data)) == message


@given(st.tuples(*[st.integers(0, 1000)] * 6))
def test_ranges_survive_or_are_refused(bounds: tuple[int, ...]) -> None:
    where = KVRange(*bounds)
    message = wire.range_to_pb(where)
    if bounds[0] <= bounds[1] and bounds[2] <= bounds[3] and bounds[4] <= bounds[5]:
        assert wire.range_from_pb(message) == where
    else:
        assert_refused(wire.range_from_pb, message)


_inputs = st.lists(u32, max_size=5).flatmap(
    lambda ids: st.builds(PoolingInput, st.just(tuple(ids)), st.none() | st.integers(0, len(ids)))
)


@given(
    st.builds(
        PoolingRequest,
        st.lists(_inputs, min_size=1, max_size=3).map(tuple),
        st.none() | st.booleans(),
        st.none() | u32,
        st.integers(-(2**63), 2**63 - 1),
    )
)
def test_pool_requests_survive(request: PoolingRequest) -> None:
    message = wire_pooling.pool_request_to_pb(request)
    copy = worker_pb2.PoolRequest.FromString(message.SerializeToString())
    assert wire_pooling.pool_request_from_pb(copy) == request


def test_malformed_pool_messages_are_refused() -> None:
    def reply(*values: bytes) -> worker_pb2.PoolReply:
        return worker_pb2.PoolReply(values=values)

    def parse(message: worker_pb2.PoolReply) -> tuple[bytes, ...]:
        return wire_pooling.pool_reply_from_pb(message, 2)

    assert parse(reply(b"1234", b"12345678")) == (b"1234", b"12345678")
    for values in ((b"1234",), (b"1234", b""), (b"1234", b"123"), (b"1234", bytes(1 << 19))):
        assert_refused(parse, reply(*values))
    behind = worker_pb2.PoolInput(token_ids=[1], second_start=2)
    assert_refused(wire_pooling.pool_request_from_pb, worker_pb2.PoolRequest(inputs=[behind]))
    assert_refused(wire_pooling.pool_request_from_pb, worker_pb2.PoolRequest())
    for info in (common_pb2.PoolingInfo(num_values=1), common_pb2.PoolingInfo(task=1)):
        assert_refused(wire_pooling.pooling_info_from_pb, info)


def test_every_kind_of_message_is_generated_above() -> None:
    """A new oneof member without a mapping must not go unnoticed."""
    oneof = worker_pb2.GatewayMessage.DESCRIPTOR.oneofs_by_name["message"]
    kinds = [field.name for field in oneof.fields]
    assert set(kinds) == set(wire._GATEWAY_MESSAGES)
    kinds = worker_pb2.LegMessage.DESCRIPTOR.fields_by_name
    assert set(kinds) == {*wire._LEG_MESSAGES, "tokens"}


def test_causes_have_the_same_numbers() -> None:
    numbers = {f"CAUSE_{c.name}": int(c) for c in Cause} | {"CAUSE_UNSPECIFIED": 0}
    assert dict(common_pb2.Cause.items()) == numbers


def assert_refused(parse: Callable[[Any], Any], message: Any) -> None:
    with pytest.raises(BatonError) as caught:
        parse(message)
    assert caught.value.cause is Cause.PROTOCOL


def cause_of(parse: Callable[[Any], Any], message: Any) -> Cause | None:
    try:
        parse(message)
    except BatonError as error:
        return error.cause
    return None


@given(gateway_message, st.data())
def test_damaged_messages_are_parsed_or_refused(message: Any, data: st.DataObject) -> None:
    """Whatever a byte is changed into: another message, or a typed refusal, never another error."""
    raw = bytearray(wire.gateway_message_to_pb(message).SerializeToString())
    if raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        damaged = worker_pb2.GatewayMessage.FromString(bytes(raw))
    except DecodeError:
        return
    assert cause_of(wire.gateway_message_from_pb, damaged) in (None, Cause.PROTOCOL)
