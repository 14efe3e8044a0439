"""/v1/messages: what a chat in Anthropic's shape becomes, and how it is answered."""

import json
from typing import Any

import anthropic
import httpx
import pytest

from baton.errors import BatonError, Cause
from baton.gateway.message_fields import MessagesRequest
from baton.settings import GatewaySettings
from baton.text import Tokenizer
from baton.types import FinishReason
from tests.gateway.fakes import FakeBackend, chunks

URL = "/v1/messages"
USER = {"role": "user", "content": "Hi"}
BODY = {"model": "tiny", "max_tokens": 100, "messages": [USER]}
TOOL = {"name": "weather", "input_schema": {"type": "object"}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(
        enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3"
    )


@pytest.fixture
def answer(backend: FakeBackend, tokenizer: Tokenizer) -> Any:
    def say(text: str, finish: FinishReason = FinishReason.STOP) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        backend.script = lambda request: chunks(request, ids, finish=finish)

    return say


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Each with the name that its data says."""
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


async def test_whole(client: httpx.AsyncClient, answer: Any) -> None:
    answer("<think>Hm.</think>Hello")
    body = (await client.post(URL, json=BODY)).json()
    assert body["id"].startswith("msg-")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny")
    assert body["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Hello"},
    ]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    usage = body["usage"]
    assert usage["cache_read_input_tokens"] == 2
    assert usage["input_tokens"] > 0
    assert usage["output_tokens"] > 0


async def test_stream(client: httpx.AsyncClient, answer: Any) -> None:
    answer(f"<think>Hm.</think>Look: {CALL}")
    found = events(await client.post(URL, json=BODY | {"stream": True, "tools": [TOOL]}))
    kinds = [event["type"] for event in found]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert found[0]["message"]["content"] == []
    assert found[0]["message"]["usage"]["output_tokens"] == 0
    open_block, blocks = None, []
    for event in found[1:-2]:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert open_block is None
                open_block = index
                assert index == len(blocks)
                blocks.append({**block, "said": ""})
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                assert index == open_block
                (part,) = (value for name, value in delta.items() if name != "type")
                blocks[index]["said"] += part
            case {"type": "content_block_stop", "index": index}:
                assert index == open_block
                open_block = None
    assert open_block is None
    assert [(block["type"], block["said"]) for block in blocks] == [
        ("thinking", "Hm."),
        ("text", "Look: "),
        ("tool_use", '{"city": "Bern"}'),
    ]
    assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] > 0


async def test_stop_reasons(client: httpx.AsyncClient, answer: Any, backend: FakeBackend) -> None:
    answer("Hello", FinishReason.LENGTH)
    assert (await client.post(URL, json=BODY)).json()["stop_reason"] == "max_tokens"
    answer("Hello")
    body = (await client.post(URL, json=BODY | {"stop_sequences": ["lo"]})).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "lo")
    assert body["content"] == [{"type": "text", "text": "Hel"}]
    assert backend.request.sampling.stop == ("lo",)
    answer('{"city": "Bern"}')
    choice = {"type": "tool", "name": "weather"}
    body = (await client.post(URL, json=BODY | {"tools": [TOOL], "tool_choice": choice})).json()
    assert body["stop_reason"] == "tool_use"
    assert body["content"][0]["input"] == {"city": "Bern"}


async def test_a_failure_in_the_middle_is_an_event(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    error = BatonError(Cause.WORKER_LOST, "gone")
    backend.script = lambda request: [*chunks(request, ids, finish=None), error]
    last = events(await client.post(URL, json=BODY | {"stream": True}))[-1]
    assert last["type"] == "error"
    assert last["error"]["type"] == "service_unavailable_error"


def test_blocks_become_messages() -> None:
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "c1",
        "content": [{"type": "text", "text": "9"}],
    }
    body = MessagesRequest.model_validate(
        {
            "max_tokens": 5,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Warm?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, use]},
                {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
                {"role": "assistant", "content": "It is"},
            ],
        }
    )
    chat = body.to_chat()
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Warm?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "9"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "It is"},
    ]
    assert chat.continue_final_message
    assert not chat.add_generation_prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"text": 3}]}]}, "messages"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"temperature": 3}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(URL, json=BODY | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


async def test_count_tokens_refuses_what_messages_refuse(client: httpx.AsyncClient) -> None:
    body = {"messages": [USER], "tools": [TOOL | {"name": "a b"}]}
    response = await client.post(f"{URL}/count_tokens", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_count_tokens(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"messages": [USER], "system": "Be brief."}
    counted = (await client.post(f"{URL}/count_tokens", json=body)).json()
    await client.post(URL, json=BODY | body)
    assert counted == {"input_tokens": len(backend.request.prompt_token_ids)}


async def test_the_anthropic_client(server: str, answer: Any) -> None:
    answer(f"Look: {CALL}")
    async with anthropic.AsyncAnthropic(base_url=f"http://{server}", api_key="k") as client:
        message = await client.messages.create(
            model="tiny", max_tokens=100, messages=[USER], tools=[TOOL]
        )
        assert [block.type for block in message.content] == ["text", "tool_use"]
        async with client.messages.stream(
            model="tiny", max_tokens=100, messages=[USER], tools=[TOOL]
        ) as stream:
            final = await stream.get_final_message()
        assert final.content[1].input == {"city": "Bern"}
        assert final.stop_reason == "tool_use"
        counted = await client.messages.count_tokens(model="tiny", messages=[USER])
        assert counted.input_tokens > 0
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="other", max_tokens=1, messages=[USER])


class TestKeys:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(api_key=("secret",))

    @pytest.mark.parametrize(("key", "status"), [("secret", 200), ("other", 401)])
    async def test_either_header(self, client: httpx.AsyncClient, key: str, status: int) -> None:
        for headers in ({"x-api-key": key}, {"Authorization": f"Bearer {key}"}):
            response = await client.post(URL, json=BODY, headers=headers)
            assert response.status_code == status
