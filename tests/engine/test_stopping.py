import pytest

from baton.engine.stopping import check_stop
from baton.types import FinishReason, SamplingParams

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
    assert check_stop(params, (EOS,), token_id, num_output, 60 + num_output, 100) == expected
