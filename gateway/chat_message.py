"""What one choice of a chat says: text of the model → fields of `delta` and `message`."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baton.gateway.choice import Delta
from baton.gateway.openai import ChatCompletionRequest
from baton.gateway.parsers.message import MessageParser
from baton.gateway.parsers.pieces import Arguments, CallStart, Content, Parser, Piece, Reasoning
from baton.gateway.parsers.reasoning import ThinkParser
from baton.gateway.parsers.tools import TOOL_PARSERS, NamedCall, RequiredCalls


@dataclass(frozen=True, slots=True)
class MessageStyle:
    """How to read the answers to one request."""

    tools: Callable[[], Parser] | None
    reasoning: Callable[[], ThinkParser] | None
    shows_reasoning: bool
    max_calls: int | None
    is_named: bool  # the one call is what was asked for, and ends like any answer

    @classmethod
    def of(
        cls,
        body: ChatCompletionRequest,
        tool_parser: str | None,
        reasoning: Callable[[], ThinkParser] | None,
    ) -> "MessageStyle":
        """
        Args:
            tool_parser: name of the format in which the model calls of its own accord.
        """
        chosen, tools = body.chosen, None
        if chosen == "auto" and body.tools and tool_parser is not None:
            tools = TOOL_PARSERS[tool_parser]
        elif body.is_named:
            tools = lambda: NamedCall(chosen)  # noqa: E731 - a factory like the others
        elif chosen == "required":
            tools = RequiredCalls
        return cls(
            tools,
            # A grammar leaves no room for reasoning.
            reasoning if body.call_grammar() is None else None,
            body.include_reasoning,
            None if body.parallel_tool_calls else 1,
            body.is_named,
        )


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: str = ""

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ChoiceMessage:
    """One choice. Fed its deltas in order."""

    def __init__(self, style: MessageStyle) -> None:
        self._style = style
        self._parser = MessageParser(
            style.reasoning() if style.reasoning else None, style.tools() if style.tools else None
        )
        self._content = ""
        self._reasoning = ""
        self._calls: list[_Call] = []

    @property
    def num_reasoning_tokens(self) -> int:
        return self._parser.num_reasoning_tokens

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """`delta` objects of the chunks to send, one for each piece."""
        pieces = self._parser.push(delta.text, len(delta.token_ids))
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        return [fields for piece in pieces if (fields := self._fields(piece)) is not None]

    def _fields(self, piece: Piece) -> dict[str, Any] | None:
        match piece:
            case Content(text):
                self._content += text
                return {"content": text}
            case Reasoning(text):
                if not self._style.shows_reasoning:
                    return None
                self._reasoning += text
                return {"reasoning": text}
            case CallStart(name):
                return self._start_call(name)
            case Arguments(text):
                if self._is_full:
                    return None
                self._calls[-1].arguments += text
                return _call_delta(len(self._calls) - 1, {"function": {"arguments": text}})

    def _start_call(self, name: str) -> dict[str, Any] | None:
        call = _Call(f"call_{uuid.uuid4().hex[:24]}", name)
        self._calls.append(call)
        return None if self._is_full else _call_delta(len(self._calls) - 1, call.body())

    @property
    def _is_full(self) -> bool:
        """The last call is one more than is wanted."""
        limit = self._style.max_calls
        return limit is not None and len(self._calls) > limit

    def finish_reason(self, reason: str | None) -> str | None:
        """As `reason`, unless the choice stopped to have tools called."""
        if reason == "stop" and self._calls and not self._style.is_named:
            return "tool_calls"
        return reason

    def message(self) -> dict[str, Any]:
        """The fields of `message` that come from the model."""
        calls = [call.body() for call in self._calls[: self._style.max_calls]]
        fields: dict[str, Any] = {
            "content": self._content or (None if calls or self._reasoning else ""),
            "reasoning": self._reasoning or None,
        }
        return {**fields, "tool_calls": calls} if calls else fields


def _call_delta(index: int, fields: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **fields}]}
