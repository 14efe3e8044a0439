"""Where a model's post-processor puts one text or two: what stands before, between and behind them.

Found out once, with texts of a token or so. To hand it long ones that were cut is no way: the
library keeps all that was cut off, in pieces, and joins every piece of one text with every piece of
the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from tokenizers import Tokenizer as Backend


@dataclass(frozen=True, slots=True)
class InputFrame:
    """`pieces`: (number of the text that goes here, or None; type id; ids if it is no text)."""

    pieces: tuple[tuple[int | None, int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, backend: Backend, *, is_pair: bool, add_special_tokens: bool) -> "InputFrame":
        """
        Raises:
            ValueError: the tokenizer makes no tokens at all.
        """
        text = _some_text(backend)
        pair = text if is_pair else None
        whole = backend.encode(text, pair, add_special_tokens=add_special_tokens)
        tokens = zip(whole.sequence_ids, whole.type_ids, whole.ids, strict=True)
        return cls(
            tuple(
                (sequence, type_id, () if sequence is not None else tuple(t[2] for t in group))
                for (sequence, type_id), group in groupby(tokens, key=lambda token: token[:2])
            )
        )

    @property
    def num_special_tokens(self) -> int:
        return sum(len(ids) for _, _, ids in self.pieces)

    def fill(self, parts: Sequence[Sequence[int]]) -> tuple[list[int], int | None]:
        """The ids of a whole input, and where those of type 1 begin, if there are any."""
        whole: list[int] = []
        starts: int | None = None
        for sequence, type_id, special_ids in self.pieces:
            ids = special_ids if sequence is None else parts[sequence]
            if type_id == 1 and starts is None and ids:
                starts = len(whole)
            whole += ids
        return whole, starts


def _some_text(backend: Backend) -> str:
    """A text of at least one token."""
    for text in ("x", *backend.get_vocab(with_added_tokens=True)):
        if backend.encode(text, add_special_tokens=False).ids:
            return text
    raise ValueError("the tokenizer makes no tokens")
