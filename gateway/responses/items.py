"""Items of /v1/responses, in and out, as messages of a chat."""

from collections.abc import Mapping, Sequence
from typing import Any

from baton.errors import Cause, InvalidRequest

Items = Sequence[Mapping[str, Any]]
Chat = list[dict[str, Any]]
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


def to_messages(items: Items) -> Chat:
    """What an assistant said in one turn (reasoning, text, calls) becomes one message.

    Raises:
        InvalidRequest: param `input`; an item is malformed, or none for a model of text.
    """
    chat: Chat = []
    reasoning: str | None = None  # of the message that follows
    for item in items:
        match item:
            case {"type": "function_call_output", "call_id": str() as call_id}:
                content = _text(item.get("output"))
                chat.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case {"type": "function_call", "call_id": str() as call_id, "name": str() as name}:
                call = _call(call_id, name, item.get("arguments"))
                turn = _turn(chat, reasoning)
                reasoning = None
                turn.setdefault("tool_calls", []).append(call)
            case {"type": "reasoning"}:
                reasoning = _text(item.get("content") or item.get("summary") or "")
            case {"role": "assistant"} if item.get("type", "message") == "message":
                message = {"role": "assistant", "content": _text(item.get("content"))}
                chat.append(message if reasoning is None else message | {"reasoning": reasoning})
                reasoning = None
            case {"role": str() as role} if item.get("type", "message") == "message":
                chat.append({"role": _role(role), "content": _text(item.get("content"))})
            case _:
                raise _refusal(item)
    return chat


def is_unfinished(items: Items) -> bool:
    """The last item is a message that an assistant has not ended: the answer goes on with it."""
    last: Mapping[str, Any] = items[-1] if items else {}
    is_message = last.get("type", "message") == "message" and last.get("role") == "assistant"
    return is_message and last.get("status") in ("in_progress", "incomplete")


def _turn(chat: Chat, reasoning: str | None) -> dict[str, Any]:
    """The assistant's message that a call belongs to."""
    if reasoning is None and chat and chat[-1]["role"] == "assistant":
        return chat[-1]
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    chat.append(message if reasoning is None else message | {"reasoning": reasoning})
    return chat[-1]


def _call(call_id: str, name: str, arguments: object) -> dict[str, Any]:
    if not isinstance(arguments, str):
        raise InvalidRequest("input: arguments of a function_call are a text.", "input")
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _role(role: str) -> str:
    if role not in _ROLES:
        raise InvalidRequest(f"input: a role is one of {', '.join(_ROLES)}.", "input")
    return _ROLES[role]


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("input: content is a text or a list of parts.", "input")
    return "\n".join(_part_text(part) for part in content)


def _part_text(part: object) -> str:
    match part:
        case {"type": "refusal", "refusal": str() as text}:
            return text
        case {"type": str() as kind, "text": str() as text} if kind in _TEXT_PARTS:
            return text
        case {"type": "input_image" | "input_file" | "input_audio" as kind}:
            raise InvalidRequest(
                f"input: this model takes text, not {kind}.", "input", Cause.UNSUPPORTED
            )
    raise InvalidRequest("input: a part of a message is malformed.", "input")


def _refusal(item: Mapping[str, Any]) -> InvalidRequest:
    kind = item.get("type")
    if kind in (None, "message", "function_call", "function_call_output", "item_reference"):
        return InvalidRequest("input: an item is malformed.", "input")
    return InvalidRequest(
        "input: items are messages, reasoning, function_call, function_call_output and "
        "item_reference.",
        "input",
        Cause.UNSUPPORTED,
    )
