"""What a reader takes next, however the prefill gets on."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.progress import KVReady, ReadCursor
from baton.types import KVRange


@st.composite
def prefills(draw: st.DrawFn, num_layers: int, num_tokens: int) -> list[KVReady]:
    """The marks of a prompt computed in chunks, some of them skipped."""
    marks, done = [], draw(st.integers(0, num_tokens))
    while done < num_tokens:
        stop = draw(st.integers(done + 1, num_tokens))
        marks += [KVReady(done, stop, layer) for layer in range(1, num_layers)]
        marks.append(KVReady(stop))
        done = stop
    *between, last = marks or [KVReady(num_tokens)]
    return [mark for mark in between if draw(st.booleans())] + [last]


@given(st.data())
def test_everything_is_taken_once_and_never_before_it_is_ready(data: st.DataObject) -> None:
    num_layers, num_tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    where = KVRange(
        data.draw(st.integers(0, num_layers - 1)), num_layers, data.draw(st.integers(0, 40)), 0
    )
    where = KVRange(where.layer_start, num_layers, min(where.token_start, num_tokens), num_tokens)
    cursor = ReadCursor(where)
    taken = dict.fromkeys(range(where.layer_start, where.layer_stop), where.token_start)
    for ready in data.draw(prefills(num_layers, num_tokens)):
        while (span := cursor.next_span(ready)) is not None:
            stop = data.draw(st.integers(span.token_start + 1, span.token_stop))
            part = KVRange(span.layer_start, span.layer_stop, span.token_start, stop)
            for layer in range(part.layer_start, part.layer_stop):
                assert taken[layer] == part.token_start, "a gap, or twice"
                assert part.token_stop <= ready.tokens_in(layer), "too early"
                taken[layer] = part.token_stop
            cursor.took(part)
            assert cursor.num_tokens == min(taken.values())
            if data.draw(st.booleans()):
                break
    while (span := cursor.next_span(KVReady(num_tokens))) is not None:
        cursor.took(span)
    assert cursor.is_complete


@given(st.data())
def test_of_two_marks_the_later_one_is_beyond(data: st.DataObject) -> None:
    marks = data.draw(prefills(3, 30))
    for earlier, later in pairwise(marks):
        assert later.is_beyond(earlier)
        assert not earlier.is_beyond(later)
        assert all(later.tokens_in(layer) >= earlier.tokens_in(layer) for layer in range(3))
    assert not marks[0].is_beyond(marks[0])


def test_old_tokens_go_before_new_ones_and_equal_layers_together() -> None:
    cursor = ReadCursor(KVRange(0, 4, 0, 90))
    ready = KVReady(30, 60, 2)
    assert cursor.next_span(ready) == KVRange(0, 4, 0, 30)
    cursor.took(KVRange(0, 4, 0, 30))
    assert cursor.next_span(ready) == KVRange(0, 2, 30, 60)
    cursor.took(KVRange(0, 2, 30, 60))
    assert cursor.next_span(ready) is None
    assert cursor.next_span(KVReady(60, 90, 1)) == KVRange(2, 4, 30, 60)
