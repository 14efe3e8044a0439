"""Bad words as the engine sees them: sequences of token ids."""

from collections.abc import Sequence

from baton.errors import InvalidRequest
from baton.sampling_params import MAX_BAD_WORDS
from baton.text.tokenizer import Tokenizer

MAX_CHARS = 1024  # of one word


def bad_words_token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written at the start of a text and behind a space, where that differs in
    more than the number of tokens; what vLLM bans.

    Raises:
        InvalidRequest: param `bad_words`: too long, or more than MAX_BAD_WORDS sequences.
    """
    sequences: list[tuple[int, ...]] = []
    for word in words:
        if not 0 < len(word) <= MAX_CHARS:
            raise InvalidRequest(f"bad_words must have 1 to {MAX_CHARS} characters", "bad_words")
        bare, spaced = (
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False))
            for prefix in ("", " ")
        )
        sequences.append(bare)
        if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
            sequences.append(spaced)
    distinct = tuple(dict.fromkeys(ids for ids in sequences if ids))
    if len(distinct) > MAX_BAD_WORDS:
        message = f"bad_words make more than {MAX_BAD_WORDS} token sequences"
        raise InvalidRequest(message, "bad_words")
    return distinct
