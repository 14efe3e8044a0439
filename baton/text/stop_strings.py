"""Stop strings found in text that arrives in pieces."""

from collections.abc import Sequence


def _borders(pattern: str) -> list[int]:
    """borders[k] = length of the longest proper prefix of pattern[:k] that is also its suffix."""
    borders = [0] * (len(pattern) + 1)
    length = 0
    for end in range(1, len(pattern)):
        while length and pattern[end] != pattern[length]:
            length = borders[length]
        length += pattern[end] == pattern[length]
        borders[end + 1] = length
    return borders


class _Pattern:
    """Knuth–Morris–Pratt over a stream: `matched` characters of the stop string are a suffix of the
    text."""

    __slots__ = ("borders", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.borders = _borders(text)
        self.matched = 0

    def step(self, char: str) -> bool:
        while self.matched and self.text[self.matched] != char:
            self.matched = self.borders[self.matched]
        self.matched += self.text[self.matched] == char
        return self.matched == len(self.text)


class StopStringMatcher:
    """Passes text through until a stop string is complete.

    The stop that *ends* first wins, among those the longest; so the result does not depend on how
    the text was cut into pieces. Held back is exactly the longest suffix that a stop string could
    still begin with. Linear in the text, times the number of stop strings.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """`stops`: none may be empty."""
        assert all(stops), "an empty stop string would stop everything"
        self._patterns = tuple(_Pattern(stop) for stop in stops)
        self._include_stop = include_stop
        self._held = ""
        self.has_stops = bool(stops)
        self.stop: str | None = None  # the stop string that was found

    def push(self, text: str) -> str:
        """What may be shown now. After `stop` is set, everything is swallowed."""
        if self.stop is not None or not self._patterns:
            return "" if self._patterns else text
        for index, char in enumerate(text):
            done = [p.text for p in self._patterns if p.step(char)]
            if done:
                self.stop = max(done, key=len)
                shown = self._held + text[: index + 1]
                self._held = ""
                return shown if self._include_stop else shown[: len(shown) - len(self.stop)]
        shown = self._held + text
        keep = len(shown) - max(p.matched for p in self._patterns)
        self._held = shown[keep:]
        return shown[:keep]

    def finish(self) -> str:
        """What was held back; no more text will come."""
        held, self._held = self._held, ""
        return held
