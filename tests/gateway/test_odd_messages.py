"""Conversations of which one value is not what it should be: an answer or a 400, whatever it is."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from baton.settings import GatewaySettings
from tests.gateway.test_errors import CHAT, error_of

JUNK: list[Any] = [None, 3, "x", [3], [{}], {"a": 1}]
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "a", "reasoning": "Hm.", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "9"}]},
        ],
        "tools": [_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
    "/v1/messages": {
        "max_tokens": 3,
        "system": [{"type": "text", "text": "Hi"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "redacted_thinking", "data": ""},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "c",
                        "content": [{"type": "text", "text": "9"}],
                    }
                ],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "enabled", "budget_tokens": 9},
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Hm."}],
            },
            {"type": "message", "role": "assistant", "status": "completed", "content": "a"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "9"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "f"}],
        },
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
    },
}


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(enable_auto_tool_choice=True, tool_call_parser="hermes")


def variants(value: Any) -> Iterator[Any]:
    """`value` with one thing in it replaced, or left out."""
    yield from JUNK
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {name: other for name, other in value.items() if name != key}
            for variant in variants(inner):
                yield {**value, key: variant}
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            for variant in variants(inner):
                yield [*value[:index], variant, *value[index + 1 :]]


@pytest.mark.parametrize("url", BODIES)
async def test_odd_values(client: httpx.AsyncClient, url: str) -> None:
    bodies = list(variants(BODIES[url]))[len(JUNK) :]
    answers = [(await client.post(url, json=body), body) for body in bodies]
    for response, body in answers:
        if response.status_code not in (200, 404):
            assert error_of(response, 400)["message"], body
    statuses = [response.status_code for response, _ in answers]
    assert statuses.count(200) > 10
    assert statuses.count(400) > 100
