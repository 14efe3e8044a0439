"""The parsers of one choice, in order: reasoning, then calls in what is left."""

from baton.gateway.parsers.pieces import Content, Parser, Piece
from baton.gateway.parsers.reasoning import ThinkParser


class MessageParser:
    """`num_reasoning_tokens` counts whole chunks: the one in which the reasoning ends included."""

    def __init__(self, reasoning: ThinkParser | None, tools: Parser | None) -> None:
        self.num_reasoning_tokens = 0
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str, num_tokens: int) -> list[Piece]:
        if self._reasoning is None:
            return self._find_calls([Content(text)] if text else [])
        was_reasoning = self._reasoning.is_reasoning
        pieces = self._reasoning.push(text)
        if was_reasoning or self._reasoning.is_reasoning:
            self.num_reasoning_tokens += num_tokens
        return self._find_calls(pieces)

    def finish(self) -> list[Piece]:
        pieces = self._find_calls(self._reasoning.finish() if self._reasoning else [])
        return pieces + (self._tools.finish() if self._tools else [])

    def _find_calls(self, pieces: list[Piece]) -> list[Piece]:
        if self._tools is None:
            return pieces
        found: list[Piece] = []
        for piece in pieces:
            found += self._tools.push(piece.text) if isinstance(piece, Content) else [piece]
        return found
