from hypothesis import given
from hypothesis import strategies as st

from baton.text import OutputText, Tokenizer
from baton.types import SamplingParams


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_surplus_tokens_behind_a_stop_do_not_count(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, SamplingParams(stop=("d",)))
    ids = encode(tokenizer, "abcdxyz")
    assert output.push(ids) == "abc"
    assert output.stop_string == "d"
    assert output.num_tokens == 4
    assert output.push(ids) == ""
    assert output.num_tokens == 4
    assert output.finish() == ""


@given(text=st.text(alphabet="abé中", max_size=20), cut=st.integers(0, 20))
def test_chunking_of_tokens_changes_nothing(tokenizer: Tokenizer, text: str, cut: int) -> None:
    params = SamplingParams(stop=("ab", "中b"))
    ids = encode(tokenizer, text)
    whole = OutputText(tokenizer, params)
    parts = OutputText(tokenizer, params)
    expected = whole.push(ids) + whole.finish()
    assert parts.push(ids[:cut]) + parts.push(ids[cut:]) + parts.finish() == expected
    assert (parts.stop_string, parts.num_tokens) == (whole.stop_string, whole.num_tokens)


def test_the_first_min_tokens_never_stop(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, SamplingParams(stop=("ab",), min_tokens=3))
    assert output.push(encode(tokenizer, "abab")) + output.finish() == "abab"
    assert output.stop_string is None
    output = OutputText(tokenizer, SamplingParams(stop=("ab",), min_tokens=2))
    assert output.push(encode(tokenizer, "abab")) == "ab"
    assert output.stop_string == "ab"


def test_a_stop_id_is_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "ab")
    hidden = OutputText(tokenizer, SamplingParams())
    assert hidden.push(ids, stop_token_id=ids[-1]) == "a"
    assert hidden.num_tokens == 2
    shown = OutputText(tokenizer, SamplingParams(include_stop_str_in_output=True))
    assert shown.push(ids, stop_token_id=ids[-1]) == "ab"


def test_finish_flushes_the_held_text_and_the_broken_character(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, SamplingParams(stop=("abc",)))
    assert output.push([*encode(tokenizer, "xab"), encode(tokenizer, "🎉")[0]]) == "x"
    assert output.finish() == "ab\ufffd"
