"""Clients that people put between themselves and the API: langchain-openai and litellm, unchanged.

Both are heavy, so they are an extra of their own: `make test-contract`.
"""

import os
import warnings
from typing import Any

import openai
import pytest

from baton.settings import GatewaySettings
from baton.text import Tokenizer
from baton.types import FinishReason
from tests.gateway.fakes import FakeBackend, chunks

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
ARGUMENTS = {"city": "Bern"}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
SCHEMA = {
    "title": "weather",
    "description": "The weather of a city.",
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "x", "parameters": SCHEMA},
}
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(
        api_key="key",
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    )


@pytest.fixture(autouse=True)
def answer(backend: FakeBackend, tokenizer: Tokenizer) -> Any:
    def say(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        backend.script = lambda request: chunks(request, ids, finish=FinishReason.STOP)

    say("Hello world")
    return say


def quiet_import(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="needs the contract extra")


# ── langchain-openai ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["chats", "responses"])
def langchain(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Once over each of the two APIs that it knows."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    return quiet_import("langchain_openai").ChatOpenAI(
        base_url=f"http://{server}/v1",
        api_key="key",
        model="tiny",
        max_retries=0,
        stream_usage=True,
        use_responses_api=request.param == "responses",
    )


async def test_langchain(langchain: Any, answer: Any) -> None:
    message = await langchain.ainvoke("Hi")
    assert message.text == "Hello world"
    assert message.usage_metadata["output_tokens"] > 0
    assert message.usage_metadata["input_token_details"]["cache_read"] == 2
    parts = [part async for part in langchain.astream("Hi")]
    assert "".join(part.text for part in parts) == "Hello world"
    assert sum((part.usage_metadata or {}).get("output_tokens", 0) for part in parts) > 0


async def test_langchain_calls_tools(langchain: Any, answer: Any) -> None:
    answer(f"Look: {CALL}")
    tools = langchain.bind_tools([TOOL])
    message = await tools.ainvoke("Hi")
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("weather", ARGUMENTS)
    whole = None
    async for part in tools.astream("Hi"):
        whole = part if whole is None else whole + part
    assert whole is not None
    assert [call["args"] for call in whole.tool_calls] == [ARGUMENTS]
    # And back again, with the result.
    answer("Sunny")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    assert (await tools.ainvoke([*USER, message, result])).text == "Sunny"


async def test_langchain_has_structured_output(
    langchain: Any, answer: Any, backend: FakeBackend
) -> None:
    answer('{"city": "Bern"}')
    structured = langchain.with_structured_output(SCHEMA, method="json_schema")
    assert await structured.ainvoke("Hi") == ARGUMENTS
    assert backend.request.sampling.structured_outputs is not None


async def test_langchain_hears_of_errors(langchain: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await langchain.ainvoke("Hi", temperature=9)
    assert refused.value.param == "temperature"


# ── litellm ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download at import
    return quiet_import("litellm")


@pytest.fixture
def target(server: str) -> dict[str, Any]:
    return {
        "model": "hosted_vllm/tiny",
        "api_base": f"http://{server}/v1",
        "api_key": "key",
        "num_retries": 0,
    }


async def test_litellm(litellm: Any, target: dict[str, Any], answer: Any) -> None:
    answer("<think>Hm.</think>Hello world")
    whole = await litellm.acompletion(messages=USER, **target)
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello world", "Hm.")
    assert whole.usage.prompt_tokens_details.cached_tokens == 2
    options = {"include_usage": True}
    stream = await litellm.acompletion(messages=USER, stream=True, stream_options=options, **target)
    parts = [part async for part in stream]
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == "Hello world"
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_litellm_calls_tools(litellm: Any, target: dict[str, Any], answer: Any) -> None:
    answer(f"Look: {CALL}")
    whole = await litellm.acompletion(messages=USER, tools=[TOOL], **target)
    (call,) = whole.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Bern"}')
    assert whole.choices[0].finish_reason == "tool_calls"
    stream = await litellm.acompletion(messages=USER, tools=[TOOL], stream=True, **target)
    rebuilt = litellm.stream_chunk_builder([part async for part in stream], messages=USER)
    (call,) = rebuilt.choices[0].message.tool_calls
    assert call.function.arguments == '{"city": "Bern"}'


async def test_litellm_speaks_responses(litellm: Any, target: dict[str, Any]) -> None:
    target["model"] = "openai/tiny"
    whole = await litellm.aresponses(input="Hi", **target)
    assert whole.output[0].content[0].text == "Hello world"
    stream = await litellm.aresponses(input="Hi", stream=True, **target)
    kinds = [str(getattr(event.type, "value", event.type)) async for event in stream]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


async def test_litellm_hears_of_errors(litellm: Any, target: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        await litellm.acompletion(messages=USER, temperature=9, **target)
    with pytest.raises(litellm.AuthenticationError):
        await litellm.acompletion(messages=USER, **{**target, "api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        await litellm.acompletion(messages=USER, **{**target, "model": "hosted_vllm/nope"})
