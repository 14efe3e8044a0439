"""What is no message is refused by name: every field that a peer may get wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from baton import wire, wire_types
from baton.errors import Cause
from baton.messages import (
    Failed,
    Submit,
)
from baton.types import (
    KVGroup,
    KVKind,
    KVLayout,
    KVTicket,
    LegId,
    Logprobs,
    Request,
    SamplingParams,
)
from baton.v1 import common_pb2, kv_pb2, worker_pb2
from baton.wire_workers import totals_from_pb
from tests.test_wire import assert_refused

LEG = LegId("r", 1)
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 2, 1, 4, "float32"),), block_size=16)
TICKET = KVTicket(
    b"t" * 16, "a:1", b"i" * 16, b"f" * 32, LAYOUT, 3, b"d" * 32, b"s" * 32, 9, 1, b"m" * 32
)
REQUEST = Request("r", (1, 2, 3), SamplingParams(n=2, seed=1))


def spoil_submit(**changes: Any) -> Any:
    message = wire.gateway_message_to_pb(Submit(LEG, REQUEST))
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = message.submit
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return message


@pytest.mark.parametrize(
    "changes",
    [
        {"leg__request_id": ""},
        {"leg__request_id": "x" * 257},
        {"request__sampling__n": 0},
        {"request__sampling__temperature": float("nan")},
        {"request__sampling__top_p": float("inf")},
        {"request__sampling__max_tokens": 0},
        {"request__sampling__prompt_logprobs": 21},
        {"request__sampling__repetition_detection__min_count": 1},
        {"request__sampling__structured_outputs__kind": 9},
        {"request__sampling__structured_outputs__text": "kind 0"},
        {"request__salt": b"x" * (wire_types.MAX_SALT_BYTES + 1)},
    ],
)
def test_malformed_submits_are_refused(changes: dict[str, Any]) -> None:
    assert_refused(wire.gateway_message_from_pb, spoil_submit(**changes))


def test_scores() -> None:
    request = replace(REQUEST, sampling=SamplingParams(seed=1, prompt_logprobs=3))
    back = wire.score_request_from_pb(wire.score_request_to_pb(request))
    assert back == replace(request, request_id="")
    assert_refused(wire.score_request_from_pb, wire.score_request_to_pb(REQUEST))
    scores = (Logprobs(-0.5, 1, ((3, -0.5), (4, -1.0))), Logprobs(-2.0, 9, ()))
    assert wire.score_reply_from_pb(wire.score_reply_to_pb(7, scores)) == (7, scores)


def test_committed_output_covers_every_choice_or_none() -> None:
    message = spoil_submit()
    message.submit.request.committed.add(token_ids=[1])
    assert_refused(wire.gateway_message_from_pb, message)


@pytest.mark.parametrize(
    "field", ["transfer_id", "incarnation", "fingerprint", "tokens_digest", "salt_digest", "mac"]
)
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x + b"x", lambda x: b""])
def test_ticket_digests_have_their_length(field: str, change: Callable[[bytes], bytes]) -> None:
    message = wire.ticket_to_pb(TICKET)
    setattr(message, field, change(getattr(message, field)))
    assert_refused(wire.ticket_from_pb, message)


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        (wire.gateway_message_from_pb, worker_pb2.GatewayMessage()),
        (wire.worker_message_from_pb, worker_pb2.WorkerMessage()),
        (wire.leg_message_from_pb, worker_pb2.LegMessage()),
        (wire.leg_message_from_pb, worker_pb2.LegMessage(queued=worker_pb2.Queued())),
        (
            wire.leg_message_from_pb,
            worker_pb2.LegMessage(failed=worker_pb2.Failed(leg=wire.leg_to_pb(LEG))),
        ),
        (
            wire.leg_message_from_pb,
            worker_pb2.LegMessage(failed=worker_pb2.Failed(leg=wire.leg_to_pb(LEG), cause=9999)),
        ),
        (
            wire.leg_message_from_pb,
            worker_pb2.LegMessage(
                progress=worker_pb2.Progress(
                    leg=wire.leg_to_pb(LEG), predicted_ms_left=float("nan")
                )
            ),
        ),
        (wire.worker_message_from_pb, worker_pb2.WorkerMessage(step=worker_pb2.StepBatch())),
        (totals_from_pb, worker_pb2.WorkerTotals(steps_by_tokens=[1, 2])),
        (wire.layout_from_pb, common_pb2.KVLayout()),
        (
            wire.layout_from_pb,
            common_pb2.KVLayout(
                block_size=16, tp_size=1, groups=[common_pb2.KVGroup(dtype="float32")]
            ),
        ),
        (wire.range_from_pb, kv_pb2.KVRange(token_start=2, token_stop=1)),
        (
            wire.chunk_from_pb,
            common_pb2.TokenChunk(
                leg=wire.leg_to_pb(LEG), token_ids=[1, 2], logprobs=[common_pb2.Logprobs()]
            ),
        ),
    ],
)
def test_malformed_messages_are_refused(parse: Callable[[Any], Any], message: Any) -> None:
    assert_refused(parse, message)


def test_details_are_cut_to_what_a_peer_accepts() -> None:
    long = Failed(LEG, Cause.INTERNAL, "x" * 10_000)
    back = wire.leg_message_from_pb(wire.leg_message_to_pb(long))
    assert back == replace(long, detail="x" * wire.MAX_DETAIL_LEN)


def test_a_request_without_seed_does_not_leave() -> None:
    with pytest.raises(ValueError, match="seed"):
        wire.gateway_message_to_pb(Submit(LEG, replace(REQUEST, sampling=SamplingParams())))
