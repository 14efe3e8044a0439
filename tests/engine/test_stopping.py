from dataclasses import replace

import pytest

from baton.engine.stopping import check_stop
from baton.types import (
    FinishReason,
    RepetitionDetection,
    SamplingParams,
    StructuredKind,
    StructuredOutput,
)

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
EOS, WORD, OTHER = 2, 7, 9


@pytest.mark.parametrize(
    ("options", "token_id", "num_output", "expected"),
    [
        ({}, OTHER, 1, (None, None)),
        ({}, EOS, 1, (STOP, EOS)),
        ({"ignore_eos": True}, EOS, 1, (None, None)),
        ({"stop_token_ids": (WORD,)}, WORD, 3, (STOP, WORD)),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, EOS, 3, (STOP, EOS)),
        ({"min_tokens": 2}, EOS, 2, (None, None)),
        ({"min_tokens": 2}, EOS, 3, (STOP, EOS)),
        ({"min_tokens": 2, "stop_token_ids": (WORD,)}, WORD, 1, (None, None)),
        ({"max_tokens": 3}, OTHER, 2, (None, None)),
        ({"max_tokens": 3}, OTHER, 3, (LENGTH, None)),
        ({"max_tokens": 3}, EOS, 3, (STOP, EOS)),
        ({"max_tokens": None}, OTHER, 39, (None, None)),
        ({"max_tokens": None}, OTHER, 40, (LENGTH, None)),
        ({"max_tokens": 90, "min_tokens": 50}, OTHER, 40, (LENGTH, None)),
    ],
)
def test_when_a_choice_ends(
    options: dict[str, object], token_id: int, num_output: int, expected: tuple[object, object]
) -> None:
    """Of a prompt of 60 tokens in a model of 100."""
    params = SamplingParams(**options)  # type: ignore[arg-type]
    output = [*range(100, 99 + num_output), token_id]
    assert check_stop(params, (EOS,), output, 60, 100) == expected


@pytest.mark.parametrize(
    ("detection", "output", "expected"),
    [
        ((3, 0, 2), [1, 2, 3], False),
        ((3, 0, 2), [1, 2, 2], True),
        ((3, 2, 2), [1, 2, 2], False),
        ((3, 2, 2), [9, 1, 2, 1, 2], True),
        ((3, 3, 3), [1, 2, 3] * 3, True),
        ((3, 3, 3), [1, 2, 3] * 2 + [1, 2, 4], False),
        ((2, 2, 3), [1, 2, 3] * 3, False),
        ((3, 1, 4), [1] * 3, False),
        ((3, 1, 4), [1] * 4, True),
        ((4, 1, 2), [1, 2, 3, 4, 1, 2, 3, 4], True),
    ],
)
def test_repetition(detection: tuple[int, int, int], output: list[int], expected: bool) -> None:
    params = SamplingParams(repetition_detection=RepetitionDetection(*detection), max_tokens=99)
    ends = FinishReason.REPETITION if expected else None
    assert check_stop(params, (), output, 60, 100) == (ends, None)
    late = replace(params, min_tokens=len(output) + 1)
    assert check_stop(late, (), output, 60, 100) == (None, None)


def test_other_reasons_win_over_repetition() -> None:
    params = SamplingParams(repetition_detection=RepetitionDetection(1), max_tokens=2)
    assert check_stop(params, (EOS,), [1, 1], 60, 100) == (LENGTH, None)
    assert check_stop(params, (EOS,), [EOS, EOS], 60, 100) == (STOP, EOS)


def test_a_grammar_ends_with_eos_whatever_else_was_asked_for() -> None:
    spec = StructuredOutput(StructuredKind.REGEX, "a")
    params = SamplingParams(structured_outputs=spec, ignore_eos=True, min_tokens=9)
    assert check_stop(params, (EOS,), [1, EOS], 60, 100) == (STOP, EOS)
