"""What is measured of a stream whose pauses are known. The server may be late, never early."""

import asyncio
from typing import Any

import pytest

from baton.benchmarks.measure import Outcome, measure
from baton.client.api import ApiClient
from tests.client.server import Answer, refusal, serving

PAUSE_S = 0.15


def chunk(text: str = "x", **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, **fields}]}


def usage(output: int, prompt: int = 5) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": output, "prompt_tokens": prompt}}


def measured(answer: Answer, keep_text: bool = True) -> Outcome:
    async def run(url: str) -> Outcome:
        async with ApiClient(url) as client:
            path, body = "/v1/completions", {"prompt": [1]}
            return await measure(client, path, body, 3, keep_text=keep_text)

    with serving(lambda path, body: answer) as server:
        return asyncio.run(run(server.url))


def test_times_are_those_of_chunks() -> None:
    events = [(PAUSE_S, chunk("a")), (PAUSE_S, chunk("")), (2 * PAUSE_S, chunk("b")), (0, usage(7))]
    outcome = measured(Answer(events=[*events]))
    assert outcome.ok
    assert (outcome.input_len, outcome.output_len) == (5, 7)
    assert outcome.text == "ab"
    assert outcome.ttft >= PAUSE_S
    assert len(outcome.itl) == 2
    assert outcome.itl[1] >= 1.5 * PAUSE_S
    assert outcome.latency == pytest.approx(outcome.ttft + sum(outcome.itl))
    assert outcome.tpot == pytest.approx((outcome.latency - outcome.ttft) / 6)


def test_a_pause_before_usage_is_no_latency() -> None:
    outcome = measured(Answer(events=[(0, chunk()), (4 * PAUSE_S, usage(1))]))
    assert outcome.latency == outcome.ttft < 4 * PAUSE_S
    assert outcome.tpot is None


def test_a_chat_s_first_chunk_without_content_is_no_token() -> None:
    def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}

    events = [
        (0.0, delta(role="assistant", content="")),
        (PAUSE_S, delta(reasoning="hm")),
        (0.0, delta(content="hi")),
        (0.0, delta(finish="stop")),
        (0.0, usage(3)),
    ]
    outcome = measured(Answer(events=[*events]))
    assert outcome.ttft >= PAUSE_S
    assert len(outcome.itl) == 2
    assert outcome.text == "hi"


def test_tokens_are_counted_by_ids_where_there_is_no_usage() -> None:
    events = [(0.0, chunk(token_ids=[1])), (0.0, chunk(token_ids=[2, 3]))]
    assert measured(Answer(events=[*events])).output_len == 3


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(429, "server_is_overloaded"), "429 server_is_overloaded"),
        (Answer("busy", 502), "HTTP 502"),
        (Answer(events=[(0, chunk())], cut=True), "stream ended early"),
        (Answer(events=[(0, {"error": {"message": "m", "code": "c"}})]), "in stream: c"),
        (Answer(cut=True), "connection lost"),
        (Answer(events=[(0, usage(0))]), "no output"),
        (Answer(events=[(0, chunk())]), "no usage"),
        (Answer(events=[(0, [1])]), "malformed chunk"),
    ],
)
def test_failures_are_outcomes(answer: Answer, kind: str) -> None:
    outcome = measured(answer)
    assert not outcome.ok
    assert outcome.kind == kind
    assert outcome.error


def test_nobody_there() -> None:
    async def run() -> Outcome:
        async with ApiClient("http://127.0.0.1:9") as client:
            return await measure(client, "/v1/completions", {}, 1, keep_text=False)

    assert asyncio.run(run()).kind == "connection refused"
