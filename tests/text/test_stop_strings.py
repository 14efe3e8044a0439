import itertools

from hypothesis import given
from hypothesis import strategies as st

from baton.text import StopStringMatcher

letters = st.text(alphabet="ab", max_size=24)
stops_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Definition: the first position where any stop ends; there, the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def feed(matcher: StopStringMatcher, text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    return [matcher.push(text[a:b]) for a, b in itertools.pairwise(edges)]


@given(text=letters, stops=stops_lists, include=st.booleans(), cuts=st.lists(st.integers(0, 24)))
def test_equals_the_definition_however_the_text_is_cut(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    matcher = StopStringMatcher(stops, include_stop=include)
    shown = "".join(feed(matcher, text, cuts)) + matcher.finish()
    assert (shown, matcher.stop) == naive(text, stops, include)


@given(text=letters, stops=stops_lists)
def test_holds_back_only_what_could_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    shown = ""
    for index, char in enumerate(text):
        shown += matcher.push(char)
        if matcher.stop is not None:
            return
        seen = text[: index + 1]
        possible = [k for s in stops for k in range(len(s)) if seen.endswith(s[:k])]
        assert len(seen) - len(shown) == max(possible, default=0)


def test_across_chunks() -> None:
    matcher = StopStringMatcher(["\n\nUser:", "END"])
    assert matcher.push("Hello\n") == "Hello"
    assert matcher.push("\nUs") == ""
    assert matcher.push("age\nE") == "\n\nUsage\n"
    assert matcher.push("ND and more") == ""
    assert matcher.stop == "END"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


def test_included_stop_is_shown_and_what_follows_is_not() -> None:
    matcher = StopStringMatcher(["END"], include_stop=True)
    assert matcher.push("aEN") == "a"
    assert matcher.push("Dx") == "END"


def test_without_stops_everything_passes() -> None:
    matcher = StopStringMatcher([])
    assert matcher.push("abc") == "abc"
    assert matcher.finish() == ""


def test_a_long_repetitive_stop_is_linear_in_work() -> None:
    """Steps are counted, not timed: each character moves a pattern forward once and back at most
    as often as it moved forward."""
    stop = "a" * 2000 + "b"
    matcher = StopStringMatcher([stop])
    shown = matcher.push("a" * 10_000)
    assert len(shown) == 8000
    assert matcher.push("b") == ""
    assert matcher.stop == stop
