"""Tools that a chat request offers to the model, and what it wants done with them."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from baton.errors import Cause, InvalidRequest
from baton.gateway.fields import Bool, Fields, NonEmpty, Text
from baton.types import StructuredKind, StructuredOutput

_MAX_TOOLS = 128
_NAME = r"^[A-Za-z0-9_.-]{1,128}$"


class Function(Fields):
    name: Annotated[Text, Field(pattern=_NAME)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None


class Tool(Fields):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Fields):
    name: NonEmpty


class NamedTool(Fields):
    type: Literal["function"] = "function"
    function: NamedFunction


class Allowed(Fields):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=_MAX_TOOLS)


class AllowedTools(Fields):
    """Some of the tools are offered; the others might as well not be there."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class ToolFields(Fields):
    tools: list[Tool] | None = Field(None, max_length=_MAX_TOOLS)
    tool_choice: ToolChoice | None = Field(None, description="auto if there are tools, else none")
    parallel_tool_calls: Bool = True

    @property
    def chosen(self) -> Literal["none", "auto", "required"] | str:
        """What becomes of the tools; a name that is none of the three is the tool to call."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode
        return self.tool_choice or ("auto" if self.tools else "none")

    @property
    def is_named(self) -> bool:
        return isinstance(self.tool_choice, NamedTool)

    @property
    def _offered(self) -> Sequence[Tool]:
        tools = self.tools or ()
        if not isinstance(self.tool_choice, AllowedTools):
            return tools
        names = {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
        return [tool for tool in tools if tool.function.name in names]

    def check_tools(self, *, auto: bool) -> None:
        """
        Args:
            auto: whether the server finds calls in what the model writes of its own accord.

        Raises:
            InvalidRequest: tools and choice contradict each other, or the server.
        """
        if self.tools == []:
            raise InvalidRequest("tools must not be an empty array.", "tools")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise InvalidRequest("When using tool_choice, tools must be set.", "tool_choice")
        if not self._named_tools() <= {tool.function.name for tool in self.tools or ()}:
            raise InvalidRequest("tool_choice names no tool of the request.", "tool_choice")
        if self.tools and self.chosen == "auto" and not auto:
            raise InvalidRequest(
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to '
                "be set",
                "tools" if self.tool_choice is None else "tool_choice",
                Cause.UNSUPPORTED,
            )

    def template_tools(self) -> list[dict[str, Any]] | None:
        """As chat templates expect them."""
        if not self.tools:
            return None
        return [tool.model_dump(exclude_none=True) for tool in self._offered]

    def call_grammar(self) -> StructuredOutput | None:
        """What the answer must be when a call is demanded: the arguments of the named tool, or a
        JSON list of calls."""
        if not self.tools or self.chosen in ("none", "auto"):
            return None
        if self.is_named:
            schema: Any = self._parameters(self.chosen)
        else:
            schema = self._calls_schema(self._offered)
        return StructuredOutput(StructuredKind.JSON_SCHEMA, json.dumps(schema))

    def _named_tools(self) -> set[str]:
        match self.tool_choice:
            case NamedTool(function=function):
                return {function.name}
            case AllowedTools(allowed_tools=allowed):
                return {tool.function.name for tool in allowed.tools}
        return set()

    def _calls_schema(self, tools: Sequence[Tool]) -> dict[str, Any]:
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "parameters": _parameters(tool),
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        bounds = {"minItems": 1} if self.parallel_tool_calls else {"minItems": 1, "maxItems": 1}
        return {"type": "array", "items": {"anyOf": calls}, **bounds}

    def _parameters(self, name: str) -> Mapping[str, Any] | None:
        for tool in self.tools or ():
            if tool.function.name == name:
                return _parameters(tool)
        return None


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}
