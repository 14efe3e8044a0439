"""What the text of an answer consists of, as it comes: content, reasoning, calls of tools."""

from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The next call begins; `Arguments` up to the next CallStart are its own."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Part of a call's arguments, which are a JSON object altogether."""

    text: str


Piece: TypeAlias = Content | Reasoning | CallStart | Arguments


class Parser(Protocol):
    """Pushed the text of one choice as it comes. However it is cut, the pieces say the same."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """The text is over: what was held back because it might have become something else."""
        ...


def held_back(text: str, *tags: str) -> int:
    """How many characters at the end of `text` may be the beginning of a tag."""
    longest = max(len(tag) for tag in tags) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


def content(text: str) -> list[Piece]:
    return [Content(text)] if text else []
