import pytest

from baton.errors import InvalidRequest
from baton.text import Tokenizer, bad_words_token_ids


def test_a_word_is_banned_at_the_start_and_behind_a_space(tokenizer: Tokenizer) -> None:
    found = bad_words_token_ids(tokenizer, ("hello", "hello"))
    assert len(found) == len(set(found))
    plain = tuple(tokenizer.encode("hello", add_special_tokens=False))
    assert plain in found
    for ids in found:
        assert tokenizer.decode(ids).strip() == "hello"


@pytest.mark.parametrize("words", [("",), ("x" * 1025,), tuple(f"a{i}" for i in range(129))])
def test_too_much_is_refused(tokenizer: Tokenizer, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bad_words_token_ids(tokenizer, words)
    assert caught.value.param == "bad_words"
