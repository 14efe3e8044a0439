"""How far a prompt's KV is computed, and how far one reader has it. Pure."""

from dataclasses import dataclass, replace

from baton.types import KVRange


@dataclass(frozen=True, slots=True)
class KVReady:
    """Computed are tokens [0, num_tokens) in all layers and, of what the running step computes,
    tokens [0, ahead_tokens) in layers [0, ahead_layers).

    Of two marks of one prompt one always covers the other.
    """

    num_tokens: int
    ahead_tokens: int = 0
    ahead_layers: int = 0

    def tokens_in(self, layer: int) -> int:
        """The KV of tokens [0, this) is there in `layer`."""
        return max(self.num_tokens, self.ahead_tokens if layer < self.ahead_layers else 0)

    def is_beyond(self, other: "KVReady") -> bool:
        """Does it cover more?"""
        return self._order() > other._order()

    def _order(self) -> tuple[int, int, int]:
        if self.ahead_tokens <= self.num_tokens:
            return self.num_tokens, 0, 0
        return self.num_tokens, self.ahead_tokens, self.ahead_layers


class ReadCursor:
    """What a reader has taken of a range: in each layer everything up to one token."""

    def __init__(self, where: KVRange) -> None:
        self._where = where
        self._next = [where.token_start] * where.num_layers

    @property
    def num_tokens(self) -> int:
        """Tokens [0, num_tokens) were taken in all layers."""
        return min(self._next)

    @property
    def is_complete(self) -> bool:
        return self.num_tokens >= self._where.token_stop

    def next_span(self, ready: KVReady) -> KVRange | None:
        """The earliest tokens that are ready and were not taken, in as many layers as are equally
        far; None when there are none."""
        layers = [i for i, token in enumerate(self._next) if token < self._stop(i, ready)]
        if not layers:
            return None
        start = min(self._next[i] for i in layers)
        first = last = next(i for i in layers if self._next[i] == start)
        while last + 1 in layers and self._next[last + 1] == start:
            last += 1
        return replace(
            self._where,
            layer_start=self._where.layer_start + first,
            layer_stop=self._where.layer_start + last + 1,
            token_start=start,
            token_stop=min(self._stop(i, ready) for i in range(first, last + 1)),
        )

    def took(self, part: KVRange) -> None:
        """`part` begins where its layers had ended."""
        for layer in range(part.layer_start, part.layer_stop):
            index = layer - self._where.layer_start
            assert self._next[index] == part.token_start, "a gap, or a repetition"
            self._next[index] = part.token_stop

    def _stop(self, index: int, ready: KVReady) -> int:
        return min(ready.tokens_in(self._where.layer_start + index), self._where.token_stop)
