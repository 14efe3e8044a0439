"""What happens to logits before the draw, against a reference that edits one number at a time."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.engine.batch import NOT_FINITE, NOTHING_ALLOWED, Sampled, SampleRequest
from baton.engine.row_edits import RowEdits
from baton.engine.sampler import Sampler
from baton.kernels.logit_masks import bits_of, mask_rows, mask_rows_torch, num_words
from baton.types import SamplingParams

VOCAB = 70  # not a multiple of 32
EOS = (3, 5)
PROMPT = (10, 11, 12, 11)
token_ids = st.integers(0, VOCAB - 1)
some_ids = st.lists(token_ids, max_size=4)


def reference(row: list[float], params: SamplingParams, output: list[int]) -> list[float]:
    """docs/sampling.md, steps 1 to 3, word by word."""
    edited = list(row)
    for i in range(VOCAB):
        if params.allowed_token_ids is not None and i not in params.allowed_token_ids:
            edited[i] = -math.inf
    for word in params.bad_words_token_ids:
        if tuple(output[max(len(output) - len(word) + 1, 0) :]) == word[:-1]:
            edited[word[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for i in (*params.stop_token_ids, *(() if params.ignore_eos else EOS)):
            edited[i] = -math.inf
    for i, bias in params.logit_bias:
        edited[i] = float(np.float32(edited[i]) + np.float32(bias))
    for i in {*PROMPT, *output}:
        value, r = np.float32(edited[i]), np.float32(params.repetition_penalty)
        value = value / r if value > 0 else value * r
        value -= np.float32(params.frequency_penalty) * np.float32(output.count(i))
        value -= np.float32(params.presence_penalty) * np.float32(i in output)
        edited[i] = float(value)
    return edited


@st.composite
def jobs(draw: st.DrawFn) -> tuple[SamplingParams, list[int]]:
    output = draw(some_ids)
    tails = [tuple(output[-n:]) for n in range(1, len(output) + 1)]
    words = st.tuples(st.sampled_from([(), *tails, (1, 2)]), token_ids).map(lambda w: (*w[0], w[1]))
    params = SamplingParams(
        max_tokens=None,
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-100, 100), max_size=3)),
        allowed_token_ids=draw(st.none() | st.lists(token_ids, min_size=1, max_size=5)),
        bad_words_token_ids=draw(st.lists(words, max_size=3)),
        stop_token_ids=draw(some_ids),
        min_tokens=draw(st.integers(0, 4)),
        ignore_eos=draw(st.booleans()),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.4])),
    )
    return params, output


@given(jobs=st.lists(jobs(), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_every_edit_is_what_the_page_says(
    jobs: list[tuple[SamplingParams, list[int]]], seed: int
) -> None:
    logits = torch.randn(len(jobs), VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    expected = [
        reference(row, *job) for row, job in zip(logits.double().tolist(), jobs, strict=True)
    ]
    requests = [
        SampleRequest(0, 0, len(PROMPT) + len(output), params, PROMPT, output)
        for params, output in jobs
    ]
    RowEdits(EOS).apply(logits, requests)
    assert logits.double().tolist() == expected


@pytest.mark.parametrize("mask", [mask_rows, mask_rows_torch])
@pytest.mark.parametrize("vocab_size", [64, 70, 95])
def test_masks_leave_other_rows_alone(mask: Any, vocab_size: int) -> None:
    logits = torch.zeros(3, vocab_size)
    bits = np.stack([bits_of([0, 31, 32, vocab_size - 1], vocab_size), bits_of([], vocab_size)])
    assert bits.shape == (2, num_words(vocab_size))
    mask(logits, [2, 0], bits)
    assert logits[1].eq(0).all()
    assert logits[0].eq(-torch.inf).all()
    assert logits[2].isfinite().nonzero().flatten().tolist() == [0, 31, 32, vocab_size - 1]


def sample(row: Tensor, params: SamplingParams, output: list[int]) -> Sampled:
    request = SampleRequest(0, 1, len(PROMPT) + len(output), params, PROMPT, output)
    ((sampled,),) = Sampler(EOS).sample(row[None], [(request,)])
    return sampled


def test_a_bad_word_never_completes() -> None:
    """Over a whole choice: without the ban it would."""
    row = torch.zeros(VOCAB)
    row[20], row[21] = 3.0, 2.9
    for words, expected in (((), [20, 20, 20, 20]), (((20, 20),), [20, 21, 20, 21])):
        params = SamplingParams(temperature=0.0, bad_words_token_ids=words)
        output: list[int] = []
        for _ in range(4):
            output.append(sample(row, params, output).token_id)
        assert output == expected


def test_constraints_that_leave_nothing_are_told_apart_from_broken_logits() -> None:
    params = SamplingParams(allowed_token_ids=(9,), bad_words_token_ids=((9,),), logprobs=1)
    row = torch.zeros(VOCAB)
    assert sample(row, params, []) == Sampled(NOTHING_ALLOWED)
    row[30] = torch.nan
    assert sample(row, params, []) == Sampled(NOT_FINITE)


def test_processed_logprobs_name_only_tokens_that_can_be_and_those_asked_for() -> None:
    row = torch.arange(VOCAB) / 10
    params = SamplingParams(
        temperature=0.0,
        allowed_token_ids=(8, 9),
        logprobs=5,
        logprob_token_ids=(8, 60),
        processed_logprobs=True,
    )
    sampled = sample(row, params, [])
    assert sampled.logprobs is not None
    assert [i for i, _ in sampled.logprobs.top] == [9, 8]
    norm = math.log(math.exp(0.8) + math.exp(0.9))
    assert dict(sampled.logprobs.asked)[8] == pytest.approx(0.8 - norm, abs=1e-6)
    assert dict(sampled.logprobs.asked)[60] == -math.inf
