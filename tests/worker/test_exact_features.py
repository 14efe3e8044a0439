"""Every feature of generation is in the exact gate: those that the matrix of `test_exact` leaves
out are here, all of them on two workers, and none is missing from both."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from baton.beam_search import Beam, BeamSearch, BeamSearchParams
from baton.messages import Release
from baton.types import Logprobs, Request, SamplingParams, StructuredKind, StructuredOutput
from tests.worker import gate
from tests.worker.fleet import Client
from tests.worker.gate import (
    EOS,
    GREEDY,
    SAMPLINGS,
    SEEDED,
    Oracle,
    Runners,
    on_the_wire,
    pair,
    prompt,
)

runners, oracle = gate.runners, gate.oracle

TAG = {
    "structures": [{"begin": "<f=a>", "schema": {"type": "object"}, "end": "</f>"}],
    "triggers": ["<f="],
}


def structured(kind: StructuredKind, text: str, **more: Any) -> dict[str, Any]:
    spec = StructuredOutput(kind, text)
    return {**SEEDED, "structured_outputs": spec, "max_tokens": 24, **more}


MORE: dict[str, dict[str, Any]] = {
    "regex": structured(StructuredKind.REGEX, "[a-f]{3,8}-[0-9]{2}", n=2),
    "choice": structured(StructuredKind.CHOICE, json.dumps(["yes", "no", "not now"]), n=3),
    "grammar": structured(StructuredKind.GRAMMAR, 'start: ("a" | "b") start | "c"', n=2),
    "any object": structured(StructuredKind.JSON_OBJECT, "", logprobs=2),
    "structural tag": structured(
        StructuredKind.STRUCTURAL_TAG, json.dumps(TAG), repetition_penalty=1.3
    ),
    "stop ids, not at once": {
        **SEEDED,
        "ignore_eos": False,
        "stop_token_ids": range(20, 60),
        "min_tokens": 4,
        "max_tokens": 30,
        "n": 2,
    },
    "greedy with all that changes logits": {
        **GREEDY,
        "presence_penalty": 1.0,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {9: 2.0, 11: -3.0},
        "logprobs": 5,
        "logprob_token_ids": (0, 250),
    },
    "logprobs of what is edited": {
        **SEEDED,
        "allowed_token_ids": range(30, 90),
        "frequency_penalty": 0.4,
        "logprobs": 4,
        "processed_logprobs": True,
        "n": 2,
    },
    "all at once": {
        **SEEDED,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.02,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {9: 2.0},
        "bad_words_token_ids": [(9, 9)],
        "logprobs": 3,
        "min_tokens": 3,
        "n": 3,
    },
}
BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"beam_width": 4, "max_tokens": 8},
    "beams of few tokens": {"beam_width": 3, "max_tokens": 8, "allowed_token_ids": range(2, 30)},
    "long beams": {"beam_width": 2, "max_tokens": 40, "length_penalty": 2.0, "ignore_eos": True},
}
# What the gateway makes of them has reached the worker's fields; scores of prompts: test_exact.
OF_THE_GATEWAY = {
    "stop",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "bad_words",
    "prompt_logprobs",
}


@pytest.mark.parametrize("name", MORE)
async def test_as_aggregated(runners: Runners, oracle: Oracle, name: str) -> None:
    client = Client()
    async with pair(runners, (16, 32)) as (p, d):
        request = client.request(prompt(50, seed=len(name)), SamplingParams(**MORE[name]))
        answer = await client.disaggregated(p, d, request)
        assert (answer.token_ids, on_the_wire(answer.logprobs)) == oracle(request)
        assert answer.stats is None or answer.stats.num_bytes > 0


async def beams_of(
    nexts: Callable[[Request], Awaitable[Logprobs]], start: Request, params: BeamSearchParams
) -> list[Beam]:
    """The gateway's search: each step is a request for one token of each beam."""
    search = BeamSearch(params, EOS)
    while not search.is_over:
        found = [
            await nexts(
                replace(
                    start,
                    request_id=f"{start.request_id}-{len(beam.token_ids)}-{number}",
                    prompt_token_ids=(*start.prompt_token_ids, *beam.token_ids),
                    sampling=search.next_params(),
                )
            )
            for number, beam in enumerate(search.beams)
        ]
        search.advance(found)
    return search.results


@pytest.mark.parametrize("name", BEAMS)
async def test_beams_as_aggregated(runners: Runners, oracle: Oracle, name: str) -> None:
    """Any prefill worker answers a step, from what is in its prefix cache by then; nothing is left
    to decode."""
    client, params = Client(), BeamSearchParams(**BEAMS[name])
    start = client.request(prompt(50, seed=len(name)), SamplingParams(temperature=0.0, seed=0))

    async def alone(request: Request) -> Logprobs:
        return oracle(request)[1][0][0]

    async with pair(runners, (16, 32)) as both:
        cached: list[int] = []

        async def apart(request: Request) -> Logprobs:
            worker, answer = both[len(cached) % 2], client.answer(request)
            leg = await client.prefill(worker, answer)
            await client.first_tokens(worker, leg, answer)
            worker.send(Release(leg))
            cached.append(answer.num_cached_on_p)
            return on_the_wire(answer.logprobs)[0][0]

        found = await beams_of(apart, start, params)
    assert found == await beams_of(alone, start, params)
    assert len(found) == params.beam_width
    assert all(num_tokens >= 32 for num_tokens in cached[2:])


def test_no_field_is_left_out() -> None:
    known = {field.name for field in fields(SamplingParams)} - OF_THE_GATEWAY
    assert known == {
        name for sampling in (*SAMPLINGS.values(), *MORE.values()) for name in sampling
    }
    of_beams = {field.name for field in fields(BeamSearchParams)} - {"temperature"}  # no effect
    assert of_beams == {name for params in BEAMS.values() for name in params}
