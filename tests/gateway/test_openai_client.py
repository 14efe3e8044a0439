"""The official client as the contract."""

from collections.abc import AsyncIterator

import openai
import pytest

from baton.settings import GatewaySettings
from tests.gateway.fakes import FakeBackend


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings.model_validate({"api_key": "key"})


@pytest.fixture
async def api(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{server}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as client:
        yield client


async def test_completions(api: openai.AsyncOpenAI) -> None:
    whole = await api.completions.create(model="tiny", prompt="Hi", logprobs=1, n=2, seed=3)
    assert [choice.text for choice in whole.choices] == ["Hello world"] * 2
    assert whole.choices[0].logprobs is not None
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 2
    stream = await api.completions.create(
        model="tiny", prompt="Hi", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "Hello world"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens * 2 == whole.usage.completion_tokens


async def test_chat(api: openai.AsyncOpenAI) -> None:
    whole = await api.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    assert whole.choices[0].message.content == "Hello world"
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = await api.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == "Hello world"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None


async def test_models(api: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in api.models.list()] == ["tiny"]
    assert (await api.models.retrieve("tiny")).id == "tiny"


async def test_errors(api: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await api.completions.create(model="tiny", prompt="Hi", temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        await api.completions.create(model="tiny", prompt=[1] * 999)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        await api.completions.create(model="nope", prompt="Hi")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await api.with_options(api_key="wrong").models.list()
    backend.is_ready = False
    backend.served = ()
    with pytest.raises(openai.InternalServerError) as unavailable:
        await api.completions.create(model="tiny", prompt="Hi")
    assert unavailable.value.status_code == 503
