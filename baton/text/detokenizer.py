"""Token ids to text, one token at a time.

Every supported decoder is, per token, a fixed byte string; the text is the UTF-8 decoding of their
concatenation. An incremental UTF-8 decoder therefore streams it exactly: it holds back at most the
three bytes of an unfinished character and never looks at an earlier token again.

The library's own `DecodeStream` re-decodes a window, holds text back for ever behind a genuine
U+FFFD and raises on sequences that no text encodes to, which sampled ids can be.
"""

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer as Backend


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print are themselves, the rest count up from
    U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """What a tokenizer.json's decoder does, reduced to the parts that act on one token and one that
    acts on the start of the text."""

    byte_level: bool = False  # GPT-2 alphabet: Llama 3, Qwen
    byte_fallback: bool = False  # tokens "<0xE4>": Llama 2, Mistral
    replacements: tuple[tuple[str, str], ...] = ()
    drop_in_first: str = ""  # a character that vanishes in the first token (Metaspace)
    word_piece: str = ""  # what a token begins with that goes on with a word; others get a space
    is_cleaned_up: bool = False  # WordPiece: no space in front of some punctuation
    strip_char: str = ""
    strip_count: int = 0  # how many of strip_char go at the start of the text

    @classmethod
    def of(cls, decoder: dict[str, Any] | None) -> "DecoderPlan":
        """Reads the `decoder` object of a tokenizer.json.

        Raises:
            ValueError: the decoder cannot be streamed token by token.
        """
        plan = cls()
        for part in _flatten(decoder):
            plan = plan._with(part)
        return plan

    def _with(self, part: dict[str, Any]) -> "DecoderPlan":
        match part:
            case {"type": "ByteLevel"}:
                return replace(self, byte_level=True)
            case {"type": "ByteFallback"}:
                return replace(self, byte_fallback=True)
            case {"type": "Fuse"}:
                return self
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                return replace(self, replacements=(*self.replacements, (old, new)))
            case {"type": "Metaspace", "replacement": char, "prepend_scheme": scheme}:
                dropped = "" if scheme == "never" else char
                pairs = (*self.replacements, (char, " "))
                return replace(self, replacements=pairs, drop_in_first=dropped)
            case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
                return replace(self, word_piece=prefix, is_cleaned_up=cleanup)
            case {"type": "Strip", "content": char, "start": start, "stop": 0}:
                return replace(self, strip_char=char, strip_count=start)
        raise ValueError(
            f"tokenizer decoder {part.get('type')!r} is not supported; supported are ByteLevel, "
            "WordPiece, Metaspace and sequences of Replace, ByteFallback, Fuse and Strip (start "
            "only)"
        )


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        raise ValueError("the tokenizer has no decoder")
    if decoder.get("type") == "Sequence":
        return [part for child in decoder["decoders"] for part in _flatten(child)]
    return [decoder]


class TokenBytes:
    """What each token adds to the text; one per tokenizer, shared by all its detokenizers.

    The table fills as ids are seen, so it is bounded by the vocabulary. Threads may race to fill an
    entry; both write the same value.
    """

    def __init__(self, backend: Backend) -> None:
        decoder = backend.decoder
        state = None if decoder is None else json.loads(decoder.__getstate__())
        self.plan = DecoderPlan.of(state)
        self.special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self._backend = backend
        self._table: dict[int, bytes] = {}

    def get(self, token_id: int) -> bytes:
        """Bytes of a token that is not the first; b"" for an id outside the vocabulary (models pad
        their logits)."""
        found = self._table.get(token_id)
        if found is None:
            found = self._table[token_id] = self._compute(token_id, first=False)
        return found

    def get_first(self, token_id: int) -> bytes:
        """Bytes of the first token of a text."""
        if not self.plan.drop_in_first and not self.plan.word_piece:
            return self.get(token_id)
        return self._compute(token_id, first=True)

    def is_known(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None

    def _compute(self, token_id: int, *, first: bool) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.plan.word_piece:
            return _of_word_piece(token, self.plan, first).encode()
        if first:
            token = token.replace(self.plan.drop_in_first, "")
        for old, new in self.plan.replacements:
            token = token.replace(old, new)
        if self.plan.byte_fallback and (byte := _fallback_byte(token)) is not None:
            return bytes((byte,))
        if self.plan.byte_level and all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        return str(token).encode()


# What the library's clean-up does, in its order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _of_word_piece(token: str, plan: DecoderPlan, first: bool) -> str:
    if not first:
        goes_on = token.startswith(plan.word_piece)
        token = token.removeprefix(plan.word_piece) if goes_on else " " + token
    for old, new in _CLEAN_UP if plan.is_cleaned_up else ():
        token = token.replace(old, new)
    return token


def _fallback_byte(token: str) -> int | None:
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


class IncrementalDetokenizer:
    """The text of one token sequence as it grows.

    The concatenation of everything that `push` and `finish` return is `Tokenizer.decode` of all
    ids, however they were cut into pushes. Bytes that are not UTF-8 become U+FFFD, one for each
    maximal ill-formed part (Unicode 15, section 3.9). Amortised O(1) per token.
    """

    __slots__ = ("_bytes", "_first", "_skip_special", "_strip_left", "_unfinished")

    def __init__(self, token_bytes: TokenBytes, *, skip_special_tokens: bool = True) -> None:
        self._bytes = token_bytes
        self._skip_special = skip_special_tokens
        self._first = True
        self._strip_left = token_bytes.plan.strip_count
        self._unfinished = b""  # the first bytes of a character

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens make certain; "" while a character is unfinished."""
        return self._decode(b"".join(map(self._piece, token_ids)), final=False)

    def finish(self) -> str:
        """The rest: U+FFFD if the last character is unfinished. Nothing may be pushed after it."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, *, final: bool) -> str:
        data = self._unfinished + data
        text, num_read = codecs.utf_8_decode(data, "replace", final)
        self._unfinished = data[num_read:]
        return self._strip(text) if self._strip_left else text

    def _piece(self, token_id: int) -> bytes:
        if self._skip_special and token_id in self._bytes.special_ids:
            return b""
        if not self._first:
            return self._bytes.get(token_id)
        self._first = not self._bytes.is_known(token_id)
        return self._bytes.get_first(token_id)

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if not text.startswith(self._bytes.plan.strip_char):
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text
