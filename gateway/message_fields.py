"""The body of Anthropic's /v1/messages, and the chat request that it amounts to."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from baton.errors import InvalidRequest
from baton.gateway.fields import (
    Bool,
    Fields,
    Float,
    Int,
    NonEmpty,
    Objects,
    StopString,
    Text,
    translated,
)
from baton.gateway.openai import ChatCompletionRequest

_MAX_MESSAGES = 2048
_MAX_STOP_SEQUENCES = 4
Blocks = Text | Objects
Chat = list[dict[str, Any]]


class InputMessage(Fields):
    role: Literal["user", "assistant"]
    content: Blocks


class MessageTool(Fields):
    name: NonEmpty
    description: Text | None = None
    input_schema: dict[str, Any]


class ToolUse(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: Bool = False


class Thinking(Fields):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int | None = Field(None, description="Accepted and ignored.")


class CountTokensRequest(Fields):
    """What has input tokens."""

    model: Text | None = None
    messages: list[InputMessage] = Field(min_length=1, max_length=_MAX_MESSAGES)
    system: Blocks | None = None
    tools: Annotated[list[MessageTool], Field(fail_fast=True)] | None = Field(None, max_length=128)
    tool_choice: ToolUse | None = None
    thinking: Thinking | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The body of a chat request that has the same prompt.

        Raises:
            InvalidRequest: a block that a model of text cannot take.
        """
        chat: Chat = []
        if self.system:
            chat.append({"role": "system", "content": _text_of(self.system, "system")})
        for message in self.messages:
            chat += _chat_messages(message)
        goes_on = self.messages[-1].role == "assistant"
        fields: dict[str, Any] = {
            "messages": chat,
            "add_generation_prompt": not goes_on,
            "continue_final_message": goes_on,
        }
        if self.tools:
            fields["tools"] = [_function(tool) for tool in self.tools]
        if self.tool_choice is not None:
            fields |= _choice(self.tool_choice)
        if self.thinking is not None:
            enabled = self.thinking.type != "disabled"
            fields["chat_template_kwargs"] = {"enable_thinking": enabled}
        return fields


class MessagesRequest(CountTokensRequest):
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "mcp_servers": ([],),
        "container": (),
    }

    max_tokens: Int
    stop_sequences: list[StopString] = Field([], max_length=_MAX_STOP_SEQUENCES)
    stream: Bool = False
    temperature: Annotated[Float, Field(ge=0, le=2)] | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    metadata: dict[str, Any] | None = Field(None, description="Accepted and ignored.")
    service_tier: Text | None = Field(None, description="Accepted and ignored.")

    def to_chat(self) -> ChatCompletionRequest:
        """
        Raises:
            InvalidRequest: a block that a model of text cannot take.
        """
        fields = self.chat_fields()
        for name in ("model", "max_tokens", "stream", "temperature", "top_p", "top_k"):
            fields[name] = getattr(self, name)
        fields["stop"] = self.stop_sequences
        return translated(ChatCompletionRequest, fields, {"stop": "stop_sequences"})


def _text_of(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refusal(content, where)
    texts = []
    for block in content:
        match block:
            case {"type": "text", "text": str() as text}:
                texts.append(text)
            case _:
                raise _refusal(block, where)
    return "\n".join(texts)


def _refusal(block: object, where: str) -> InvalidRequest:
    known = ("image", "document", "search_result", "container_upload")
    kind = block.get("type") if isinstance(block, dict) else None
    what = f"blocks of type {kind}" if kind in known else "a block that is malformed"
    return InvalidRequest(f"This model takes text, not {what}.", where)


def _chat_messages(message: InputMessage) -> Chat:
    """Results of tools are messages of their own; everything else stays one."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: Chat = []
    texts: list[str] = []
    fields: dict[str, Any] = {}
    for block in message.content:
        match block:
            case {"type": "text", "text": str() as text}:
                texts.append(text)
            case {"type": "tool_result", "tool_use_id": str() as call_id}:
                content = _text_of(block.get("content") or "", "messages")
                results.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case {"type": "tool_use", "id": str() as call_id, "name": str() as name}:
                function = {"name": name, "arguments": json.dumps(block.get("input") or {})}
                call = {"id": call_id, "type": "function", "function": function}
                fields.setdefault("tool_calls", []).append(call)
            case {"type": "thinking", "thinking": str() as thought}:
                fields["reasoning"] = thought
            case {"type": "redacted_thinking"}:
                pass
            case _:
                raise _refusal(block, "messages")
    if texts or fields or not results:
        results.append({"role": message.role, "content": "\n".join(texts), **fields})
    return results


def _function(tool: MessageTool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choice(choice: ToolUse) -> dict[str, Any]:
    fields: dict[str, Any] = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
    if choice.type != "tool":
        names = {"auto": "auto", "any": "required", "none": "none"}
        return fields | {"tool_choice": names[choice.type]}
    if choice.name is None:
        raise InvalidRequest("tool_choice of type tool needs a name.", "tool_choice")
    return fields | {"tool_choice": {"type": "function", "function": {"name": choice.name}}}
