import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.engine.batch import NOT_FINITE, Sampled, SampleRequest
from baton.engine.sampler import Sampler
from baton.types import SamplingParams

VOCAB = 4000
EOS = 7

params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 3, 100]),
    top_p=st.sampled_from([1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    max_tokens=st.just(None),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 0, 4]),
)


def logits_of(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def request(params: SamplingParams, seed: int = 1, output: tuple[int, ...] = ()) -> SampleRequest:
    prompt = (5, 6, 5, 3000)
    return SampleRequest(0, seed, len(prompt) + len(output), params, prompt, list(output))


def sample_one(row: Tensor, wanted: SampleRequest) -> Sampled:
    ((sampled,),) = Sampler([EOS]).sample(row[None], [(wanted,)])
    return sampled


@given(
    jobs=st.lists(st.tuples(params_strategy, st.integers(0, 3)), min_size=1, max_size=5),
    order=st.randoms(),
)
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_the_batch(jobs: list, order) -> None:
    logits = logits_of(len(jobs))
    groups = [
        tuple(request(params, seed=c, output=(9, 9, 8)) for c in range(num_choices))
        for params, num_choices in jobs
    ]
    alone = [tuple(sample_one(logits[i], r) for r in group) for i, group in enumerate(groups)]
    places = list(range(len(jobs)))
    order.shuffle(places)
    together = Sampler([EOS]).sample(logits[places], [groups[i] for i in places])
    assert together == [alone[i] for i in places]


def test_choices_share_a_row_and_differ() -> None:
    params = SamplingParams(seed=3, n=4)
    group = tuple(request(params, seed=params.choice_seed(c)) for c in range(4))
    (sampled,) = Sampler([EOS]).sample(torch.zeros(1, VOCAB), [group])
    assert len({s.token_id for s in sampled}) == 4


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = logits_of(2).bfloat16()
    params = SamplingParams(top_p=0.9, logprobs=2)
    groups = [(request(params),), (request(params),)]
    assert Sampler([]).sample(logits, groups) == Sampler([]).sample(logits.float(), groups)


def naive_penalties(row: Tensor, wanted: SampleRequest) -> Tensor:
    edited, params = row.clone(), wanted.params
    prompt, output = list(wanted.prompt_token_ids), list(wanted.output_token_ids)
    for token_id in set(prompt + output):
        value, penalty = float(row[token_id]), params.repetition_penalty
        value = value / penalty if value > 0 else value * penalty
        value -= params.frequency_penalty * output.count(token_id)
        value -= params.presence_penalty * (token_id in output)
        edited[token_id] = value
    return edited


def test_penalties_follow_a_growing_output() -> None:
    """Counts are carried from step to step; each step must equal a fresh count."""
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=1.4,
        presence_penalty=0.3,
        frequency_penalty=0.7,
        logprobs=5,
        processed_logprobs=True,
        max_tokens=None,
    )
    sampler, output = Sampler([]), [11]
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) * 0.1
    for step in range(200):
        wanted = SampleRequest(0, 1, 4 + len(output), params, (5, 6, 5, 3000), output)
        ((sampled,),) = sampler.sample(row[None], [(wanted,)])
        assert sampled.logprobs is not None
        expected = naive_penalties(row, wanted).double().log_softmax(0)
        got = dict(sampled.logprobs.top)
        assert sampled.token_id == int(expected.argmax())
        assert got == pytest.approx({i: float(expected[i]) for i in got}, abs=1e-5)
        output.append(sampled.token_id if step % 3 else 11)


def test_counts_are_not_shared_between_requests_with_equal_tokens() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    sampler, prompt = Sampler([]), (1, 2)
    row = torch.zeros(1, VOCAB)
    row[0, 3], row[0, 4] = 3.0, 2.0
    long, short = [3], [3]
    for output in (long, short):
        sampler.sample(row, [(SampleRequest(0, 0, 3, params, prompt, output),)])
    long.append(3)
    results = [
        sampler.sample(row, [(SampleRequest(0, 0, 9, params, prompt, output),)])
        for output in (long, short, [])
    ]
    assert [group[0].token_id for (group,) in results] == [4, 4, 3]


def test_logits_are_left_alone() -> None:
    logits = logits_of(1)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=2.0, min_tokens=5)
    Sampler([EOS]).sample(logits, [(request(params),)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("params", "num_output", "expected"),
    [
        ({"min_tokens": 2}, 1, 9),
        ({"min_tokens": 2}, 2, EOS),
        ({"min_tokens": 2, "stop_token_ids": (9, VOCAB + 1)}, 0, 10),
        ({"min_tokens": 2, "ignore_eos": True}, 0, EOS),
        ({}, 0, EOS),
    ],
)
def test_min_tokens_masks_what_would_end_the_choice(
    params: dict, num_output: int, expected: int
) -> None:
    row = torch.zeros(VOCAB)
    row[EOS], row[9], row[10] = 3.0, 2.0, 1.0
    wanted = request(SamplingParams(temperature=0.0, **params), output=(1,) * num_output)
    assert sample_one(row, wanted).token_id == expected


def test_a_broken_row_fails_alone() -> None:
    logits = logits_of(3)
    logits[1, 5] = torch.nan
    groups = [(request(SamplingParams(logprobs=1, repetition_penalty=r)),) for r in (1.0, 1.1, 1.2)]
    results = Sampler([EOS]).sample(logits, groups)
    assert results[1] == (Sampled(-1, None),)
    assert all(group[0].token_id >= 0 and group[0].logprobs for group in (results[0], results[2]))


@pytest.mark.parametrize(
    "edits",
    [
        {},
        {"logit_bias": {7: 100.0}},
        {"allowed_token_ids": (7, 8)},
        {"repetition_penalty": 1.7, "frequency_penalty": 0.4},
        {"min_tokens": 4},
    ],
)
def test_logprobs_are_those_of_the_model(edits: dict) -> None:
    row = logits_of(1)[0]
    wanted = SamplingParams(
        temperature=0.3, top_k=2, logprobs=3, logprob_token_ids=(9,), max_tokens=20, **edits
    )
    sampled = sample_one(row, request(wanted))
    expected = row.double().log_softmax(0)
    assert sampled.logprobs is not None
    assert len(sampled.logprobs.top) == 3
    assert sampled.logprobs.logprob == pytest.approx(float(expected[sampled.token_id]), abs=1e-5)
    assert sampled.logprobs.rank == int((row > row[sampled.token_id]).sum()) + 1
    assert dict(sampled.logprobs.asked)[9] == pytest.approx(float(expected[9]), abs=1e-5)
    assert [p for _, p in sampled.logprobs.top] == pytest.approx(
        np.sort(expected.numpy())[::-1][:3].tolist(), abs=1e-5
    )


def test_a_mask_does_not_hide_a_broken_row_from_logprobs() -> None:
    row = torch.zeros(VOCAB)
    row[5] = torch.nan
    for logprobs, expected in ((None, 7), (2, NOT_FINITE)):
        params = SamplingParams(allowed_token_ids=(7,), logprobs=logprobs)
        assert sample_one(row, request(params)).token_id == expected
