"""Tools and reasoning in chats: whole and streamed, enforced, refused."""

import json
from typing import Any

import httpx
import pytest

from baton.config import GatewayConfig
from baton.gateway import server
from baton.settings import GatewaySettings
from baton.text import Tokenizer
from baton.types import FinishReason, StructuredKind
from tests.gateway.fakes import FakeBackend, chunks
from tests.gateway.test_completions import events

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
ARGUMENTS = '{"city": "Bern"}'
CALL = f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>'
ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {
        "mode": "required",
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(
        enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="deepseek_r1"
    )


@pytest.fixture
def answer(backend: FakeBackend, tokenizer: Tokenizer) -> Any:
    """Makes the model say that, and stop."""

    def say(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        backend.script = lambda request: chunks(request, ids, finish=FinishReason.STOP)

    return say


async def whole(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"messages": MESSAGES, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def streamed(client: httpx.AsyncClient, **fields: Any) -> tuple[dict[str, Any], str]:
    """(message put together from the deltas, finish reason)."""
    body = {"messages": MESSAGES, "stream": True, **fields}
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    reason = ""
    for event in events(await client.post(URL, json=body)):
        (choice,) = event["choices"]
        delta = choice["delta"]
        for name in ("content", "reasoning"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                assert call["id"].startswith("call_")
                assert call["type"] == "function"
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return message, reason


async def test_a_call(client: httpx.AsyncClient, answer: Any) -> None:
    answer(f"I wonder.</think>Let me see. {CALL}")
    body = await whole(client, tools=TOOLS)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning"], message["content"]) == ("I wonder.", "Let me see. ")
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    details = body["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < body["usage"]["completion_tokens"]
    said, reason = await streamed(client, tools=TOOLS)
    assert reason == "tool_calls"
    assert (said["reasoning"], said["content"]) == ("I wonder.", "Let me see. ")
    assert said["tool_calls"] == [{"name": "weather", "arguments": ARGUMENTS}]


async def test_without_calls_nothing_changes(client: httpx.AsyncClient, answer: Any) -> None:
    answer("</think>It is warm.")
    (choice,) = (await whole(client, tools=TOOLS))["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "It is warm."
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
async def test_calls_are_found_only_where_they_may_be(
    client: httpx.AsyncClient, answer: Any, fields: dict[str, Any]
) -> None:
    answer(f"</think>{CALL}")
    (choice,) = (await whole(client, **fields))["choices"]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"


async def test_one_call_at_a_time(client: httpx.AsyncClient, answer: Any) -> None:
    answer(f"</think>{CALL}{CALL}")
    (choice,) = (await whole(client, tools=TOOLS))["choices"]
    assert len(choice["message"]["tool_calls"]) == 2
    fields = {"tools": TOOLS, "parallel_tool_calls": False}
    (choice,) = (await whole(client, **fields))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    said, _ = await streamed(client, **fields)
    assert said["tool_calls"] == [{"name": "weather", "arguments": ARGUMENTS}]


async def test_reasoning_may_be_left_out(client: httpx.AsyncClient, answer: Any) -> None:
    answer("Hm.</think>Yes")
    said, _ = await streamed(client, include_reasoning=False)
    assert (said["reasoning"], said["content"]) == ("", "Yes")


async def test_tools_reach_the_template(
    client: httpx.AsyncClient, backend: FakeBackend, answer: Any
) -> None:
    answer("</think>")
    await whole(client)
    without = backend.request.prompt_token_ids
    await whole(client, tools=TOOLS, chat_template_kwargs={"tools": "mine"})
    assert len(backend.request.prompt_token_ids) >= len(without)


async def test_required_is_enforced(
    client: httpx.AsyncClient, backend: FakeBackend, answer: Any
) -> None:
    answer(
        f'[{{"name": "weather", "parameters": {ARGUMENTS}}}, {{"name": "now", "parameters": {{}}}}]'
    )
    said, reason = await streamed(client, tools=TOOLS, tool_choice="required")
    assert [call["name"] for call in said["tool_calls"]] == ["weather", "now"]
    assert json.loads(said["tool_calls"][0]["arguments"]) == {"city": "Bern"}
    assert (said["content"], said["reasoning"], reason) == ("", "", "tool_calls")
    spec = backend.request.sampling.structured_outputs
    assert spec is not None
    assert spec.kind is StructuredKind.JSON_SCHEMA
    schema = json.loads(spec.text)
    names = [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]]
    assert names == ["weather", "now"]
    assert schema["items"]["anyOf"][0]["properties"]["parameters"] == SCHEMA


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_some_tools_are_allowed(
    client: httpx.AsyncClient, backend: FakeBackend, answer: Any, mode: str
) -> None:
    answer("</think>" if mode == "auto" else "[]")
    await whole(client, tools=TOOLS[:1], tool_choice=mode)
    expected = backend.request
    allowed = {"mode": mode, "tools": [NAMED]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    await whole(client, tools=TOOLS, tool_choice=choice)
    assert backend.request.prompt_token_ids == expected.prompt_token_ids
    found, wanted = (request.sampling.structured_outputs for request in (backend.request, expected))
    assert found == wanted
    assert (found is not None) == (mode == "required")


async def test_a_named_tool_is_enforced(
    client: httpx.AsyncClient, backend: FakeBackend, answer: Any
) -> None:
    answer(ARGUMENTS)
    (choice,) = (await whole(client, tools=TOOLS, tool_choice=NAMED))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert choice["finish_reason"] == "stop"
    spec = backend.request.sampling.structured_outputs
    assert spec is not None
    assert json.loads(spec.text) == SCHEMA


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS[1:], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": TOOLS[1:], "tool_choice": ALLOWED}, "tool_choice"),
        ({"tool_choice": ALLOWED}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "plugin", "function": {"name": "a"}}]}, "tools"),
        ({"tools": TOOLS * 100}, "tools"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(URL, json={"messages": MESSAGES, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


class TestWithoutParser:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings()

    @pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}])
    async def test_auto_is_refused(self, client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
        body = {"messages": MESSAGES, "tools": TOOLS, **fields}
        response = await client.post(URL, json=body)
        assert response.status_code == 400
        assert "--enable-auto-tool-choice" in response.json()["error"]["message"]

    async def test_none_and_named_need_no_parser(
        self, client: httpx.AsyncClient, answer: Any
    ) -> None:
        answer(ARGUMENTS)
        (choice,) = (await whole(client, tools=TOOLS, tool_choice="none"))["choices"]
        assert choice["message"]["content"] == ARGUMENTS
        (choice,) = (await whole(client, tools=TOOLS, tool_choice=NAMED))["choices"]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_auto_choice_needs_a_parser() -> None:
    config = GatewayConfig(enable_auto_tool_choice=True, redis_url="unix:///nowhere")
    assert server.run(config) == 2
