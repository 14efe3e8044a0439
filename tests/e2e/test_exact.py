"""Over real processes, tokens are those of one aggregated engine, and the KV really travelled."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from baton import LLM, BeamSearchParams, SamplingParams


@dataclass(frozen=True)
class Case:
    name: str
    prompt_len: int = 40
    sampling: dict[str, Any] = field(default_factory=dict)
    is_handed_over: bool = True  # False: the first token ends it, no decode worker is needed

    @property
    def prompt(self) -> list[int]:
        # Distinct per case from the first token on, so that no case finds another's prefix.
        seed = sum(map(ord, self.name))
        return [(seed * 31 + i * 7 + i * i) % 1900 + 20 for i in range(self.prompt_len)]


GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
# top_p and top_k are said: the gateway would take them from generation_config.json.
SEEDED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 7,
    "max_tokens": 24,
    "ignore_eos": True,
}
CASES = [
    Case("greedy", 40, GREEDY),
    Case("seeded", 50, SEEDED),
    Case("shorter than a block", 5, SEEDED),
    Case("exactly two blocks", 32, SEEDED),
    Case("chunked prefill", 400, SEEDED),
    Case("two choices", 45, {**SEEDED, "n": 2}),
    Case("four choices", 70, {**SEEDED, "n": 4, "top_p": 0.9}),
    Case("truncated", 33, {**SEEDED, "top_k": 20, "min_p": 0.02}),
    Case("penalties", 60, {**SEEDED, "frequency_penalty": 0.7, "repetition_penalty": 1.3}),
    Case("may end early", 48, {**SEEDED, "ignore_eos": False, "min_tokens": 3}),
    Case("one token", 40, {**GREEDY, "max_tokens": 1}, is_handed_over=False),
]
FLEETS = {
    "grpc": {"BATON_TRANSPORTS": "grpc"},
    "ucx": {"BATON_TRANSPORTS": "ucx"},
}


@pytest.fixture(scope="module", params=sorted(FLEETS))
def fleet(request: pytest.FixtureRequest, make_fleet) -> Iterator[Any]:
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    with make_fleet("prefill-0", **FLEETS[request.param]) as running:
        # Not the prefill worker's block size: both ends convert.
        running.start_worker("decode-0", BATON_BLOCK_SIZE="32")
        running.wait_workers("prefill-0", "decode-0")
        running.transport = request.param
        yield running


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_are_those_of_one_engine(fleet, oracle, case: Case) -> None:
    remote = fleet.metric("baton_remote_prefills_total")
    moved = fleet.metric("baton_kv_transfer_bytes_total", transport=fleet.transport)
    result = fleet.complete({"prompt": case.prompt, **case.sampling})
    assert result.error is None
    assert result.done
    assert result.token_ids == oracle(case.prompt, SamplingParams(**case.sampling))
    assert result.usage["prompt_tokens"] == case.prompt_len
    assert result.usage["completion_tokens"] == sum(map(len, result.token_ids.values()))
    if case.is_handed_over:
        assert fleet.metric("baton_remote_prefills_total") == remote + 1
        assert fleet.metric("baton_kv_transfer_bytes_total", transport=fleet.transport) > moved


def test_a_known_prefix_is_neither_computed_nor_moved_again(fleet, oracle, request) -> None:
    attempt = getattr(request.node, "execution_count", 1)  # what the last one left is known
    case = Case("a prefix known to both" + "!" * attempt, 200, SEEDED)
    first = fleet.complete({"prompt": case.prompt, **case.sampling})
    moved = fleet.metric("baton_kv_transfer_bytes_total", transport=fleet.transport)
    second = fleet.complete({"prompt": case.prompt, **case.sampling})
    again = fleet.metric("baton_kv_transfer_bytes_total", transport=fleet.transport) - moved
    assert (
        first.token_ids == second.token_ids == oracle(case.prompt, SamplingParams(**case.sampling))
    )
    assert first.usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert second.usage["prompt_tokens_details"]["cached_tokens"] >= 192
    assert 0 < again < moved / 10


def test_logprobs_travel_with_the_first_token(fleet, oracle) -> None:
    case = Case("logprobs", 40, {**SEEDED, "logprobs": 3})
    body = {"prompt": case.prompt, **case.sampling, "model": fleet.model_name()}
    answer = fleet.client.post("/v1/completions", json=body).raise_for_status().json()
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == case.sampling["max_tokens"]
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert all(len(top) >= 3 for top in logprobs["top_logprobs"])


def test_beams_are_those_of_one_engine(fleet, llm) -> None:
    case, params = Case("beams", 70), BeamSearchParams(4, 12)
    with LLM(base_url=str(fleet.client.base_url)) as remote:
        (found,) = remote.beam_search([case.prompt], params)
    (expected,) = llm.beam_search([case.prompt], params)
    assert [beam.tokens for beam in found.sequences] == [beam.tokens for beam in expected.sequences]
    assert len({tuple(beam.tokens) for beam in found.sequences}) == 4


def test_many_at_once_do_not_disturb_each_other(fleet, oracle) -> None:
    from concurrent.futures import ThreadPoolExecutor

    cases = [
        Case(f"crowd {i}", 20 + 13 * i, {**SEEDED, "seed": i, "max_tokens": 16}) for i in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda c: fleet.complete({"prompt": c.prompt, **c.sampling}), cases)
        )
    for case, result in zip(cases, results, strict=True):
        assert result.token_ids == oracle(case.prompt, SamplingParams(**case.sampling)), case.name
