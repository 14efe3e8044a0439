"""Events that are written around their text are those that JSON would make of them."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.events import TextEvents, event


@given(st.lists(st.tuples(st.integers(0, 3), st.text()), max_size=4), st.text())
def test_text_events(deltas: list[tuple[int, str]], name: str) -> None:
    def value_of(index: int, text: str) -> dict[str, Any]:
        return {"model": name, "choices": [{"index": index, "delta": {"content": text}, "x": None}]}

    events = TextEvents(value_of)
    for index, text in deltas:
        assert events.write(index, text) == event(value_of(index, text))


def test_an_event_is_named_after_its_type() -> None:
    value = {"type": "response.created", "text": "a\nb"}
    head, data, *rest = event(value, named=True).decode().split("\n")
    assert head == "event: response.created"
    assert json.loads(data.removeprefix("data: ")) == value
    assert rest == ["", ""]
