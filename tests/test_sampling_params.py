"""Ranges of SamplingParams: what is refused, and under whose name."""

from typing import Any

import pytest

from baton.errors import InvalidRequest
from baton.types import RepetitionDetection, SamplingParams, StructuredKind, StructuredOutput


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", dict.fromkeys(range(16_385), 1.0)),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", [1 << 32]),
        ("bad_words", [""]),
        ("bad_words", ["x"] * 129),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("logprobs", 21),
        ("logprob_token_ids", [1]),  # without logprobs
    ],
)
def test_values_out_of_range_are_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize("ids", [[[]], [[1]] * 129, [[1] * 129], [[-1]]])
def test_sequences_of_bad_words_are_bounded(ids: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(bad_words_token_ids=ids)
    assert caught.value.param == "bad_words"


@pytest.mark.parametrize(
    "values", [(0,), (1025,), (4, 5), (4, -1), (4, 1, 1), (4.0,), (4, True), (4, 1, None)]
)
def test_repetition_detection_is_bounded(values: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        RepetitionDetection(*values)
    assert caught.value.param == "repetition_detection"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (StructuredKind.JSON_OBJECT, "{}"),
        (StructuredKind.JSON_SCHEMA, ""),
        (StructuredKind.JSON_SCHEMA, "x" * (64 * 1024 + 1)),
        (StructuredKind.REGEX, "ä" * 2049),
    ],
)
def test_structured_outputs_are_bounded(kind: StructuredKind, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutput(kind, text)
    assert caught.value.param == "structured_outputs"


def test_biases_are_clamped_and_in_order() -> None:
    params = SamplingParams(logit_bias={7: 1e9, 3: -1e9, 5: 0.5})  # type: ignore[arg-type]
    assert params.logit_bias == ((3, -100.0), (5, 0.5), (7, 100.0))
    assert hash(params) == hash(SamplingParams(logit_bias=params.logit_bias))


def test_the_largest_token_id_is_known_with_its_field() -> None:
    assert SamplingParams(stop_token_ids=(10**6,)).max_token_id() == (-1, "")
    params = SamplingParams(
        logit_bias=((9, 1.0),), allowed_token_ids=(8,), bad_words_token_ids=((7, 10),)
    )
    assert params.max_token_id() == (10, "bad_words")
