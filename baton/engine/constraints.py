"""What a request's parameters say about single tokens: which are allowed, which are banned next,
which are favoured. Worked out once per request, not once per token."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from baton.kernels.logit_masks import Bits, bits_of
from baton.types import SamplingParams

K = TypeVar("K")
V = TypeVar("V")


class Constraints:
    """Of one request, for one vocabulary."""

    def __init__(
        self, params: SamplingParams, eos_token_ids: Collection[int], vocab_size: int
    ) -> None:
        bias = params.logit_bias
        self.bias_ids: npt.NDArray[np.int64] = np.array([i for i, _ in bias], np.int64)
        self.bias_values = np.array([value for _, value in bias], np.float32)
        self.allowed: Bits | None = None
        if params.allowed_token_ids is not None:
            self.allowed = bits_of(params.allowed_token_ids, vocab_size)
        ending = set(params.stop_token_ids)
        if not params.ignore_eos:
            ending |= set(eos_token_ids)
        self._ending_ids = [token_id for token_id in ending if 0 <= token_id < vocab_size]
        self._min_tokens = params.min_tokens
        words = params.bad_words_token_ids
        self._bad_tokens = [ids[0] for ids in words if len(ids) == 1]
        self._bad_sequences = [(list(ids[:-1]), ids[-1]) for ids in words if len(ids) > 1]

    def banned(self, output: Sequence[int], *, may_end: bool) -> list[int]:
        """Ids that must not come next: what would complete a bad word, and what would end a choice
        that has too few tokens (unless it `may_end`, because nothing else can follow)."""
        banned = self._bad_tokens.copy()
        for head, last in self._bad_sequences:
            if len(output) >= len(head) and list(output[-len(head) :]) == head:
                banned.append(last)
        if len(output) < self._min_tokens and not may_end:
            banned += self._ending_ids
        return banned


def is_constrained(params: SamplingParams, num_output_tokens: int) -> bool:
    """Whether `Constraints` or a grammar has anything to say about the next token."""
    return bool(
        params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_words_token_ids
        or params.structured_outputs is not None
        or num_output_tokens < params.min_tokens
    )


class ByIdentity(Generic[K, V]):
    """Values that belong to objects, as long as those are used: the last `size` of them.

    Entries keep their key alive, so an id is not reused while it is in here.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[int, tuple[K, V]] = OrderedDict()

    def get(self, key: K) -> V | None:
        entry = self._entries.get(id(key))
        if entry is None:
            return None
        self._entries.move_to_end(id(key))
        return entry[1]

    def put(self, key: K, value: V) -> V:
        self._entries[id(key)] = key, value
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return value

    def drop(self, key: K) -> None:
        self._entries.pop(id(key), None)
