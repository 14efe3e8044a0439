"""Server-sent events as bytes."""

import uuid
from collections.abc import Callable
from typing import Any

from pydantic_core import to_json

COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any], *, named: bool = False) -> bytes:
    """`named`: after its "type"."""
    name = b"event: %b\n" % value["type"].encode() if named else b""
    return b"%bdata: %b\n\n" % (name, to_json(value))


class TextEvents:
    """The events of one stream that bring a choice nothing but text. They are alike in all but the
    text, and nearly all events are of this kind, so each is written around it."""

    def __init__(self, value_of: Callable[[int, str], dict[str, Any]]) -> None:
        """`value_of`: (index of the choice, text) → the event."""
        self._value_of = value_of
        self._around: dict[int, tuple[bytes, bytes]] = {}  # by choice

    def write(self, index: int, text: str) -> bytes:
        around = self._around.get(index)
        if around is None:
            around = self._around[index] = self._cut(index)
        return b"%b%b%b" % (around[0], to_json(text), around[1])

    def _cut(self, index: int) -> tuple[bytes, bytes]:
        mark = uuid.uuid4().hex  # nothing a client wrote contains it
        before, _, after = event(self._value_of(index, mark)).partition(to_json(mark))
        return before, after
