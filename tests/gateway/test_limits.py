"""What is refused before it is parsed, and JSON that is not quite JSON."""

import asyncio
import contextlib
import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.gateway import body as body_module
from baton.gateway import strict_json
from baton.gateway.limits import Keys
from baton.gateway.message_fields import MessagesRequest
from baton.gateway.openai import ChatCompletionRequest, CompletionRequest
from baton.gateway.responses.fields import ResponsesRequest
from baton.settings import GatewaySettings, LimitSettings
from tests.gateway.test_errors import CHAT, COMPLETIONS, error_of

JSON = {"Content-Type": "application/json"}
GOOD = json.dumps({"prompt": "Hi"}).encode()


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings(
        max_body_bytes=2000, max_header_bytes=1000, max_headers=20, max_json_depth=8
    )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"nope", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        ('{"prompt": "Hi"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": ["\\ud83d"]}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": ["\\ud83d\\\\\\ude00"]}', "surrogate"),
        (b'{"temperature": 1e400}', "too large"),
        (b'{"x": [-1e999]}', "too large"),
        (b'{"a": ' + b"[" * 9 + b"]" * 9 + b"}", "deeper"),
        (b"[" * 1500, "deeper"),
        (b'{"a":' * 300, "deeper"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"null", "body"),
        (b"1e999", "body"),
    ],
)
@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
async def test_bodies(
    client: httpx.AsyncClient, url: str, body: bytes, says: str, limits: LimitSettings
) -> None:
    if len(body) > limits.max_body_bytes:
        with pytest.raises(InvalidRequest, match=says):
            parse_json(body, depth=limits.max_json_depth)
        return
    response = await client.post(url, content=body, headers=JSON)
    assert says in error_of(response, 400)["message"]


def parse_json(body: bytes, *, depth: int = 64, keys: int = 1000, values: int = 1000) -> Any:
    return strict_json.parse_json(body, depth, keys, values)


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 1000])
@given(st.text('ab"\\\\\\\\[{:]},', max_size=40), st.integers(0, 4))
def test_pieces_do_not_matter(piece_bytes: int, text: str, extra: int) -> None:
    value: Any = {text: [text, {"k": text}], "z": 1}
    for _ in range(extra):
        value = [value]
    body = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "MAX_BYTES_AT_ONCE", piece_bytes)
        assert parse_json(body, depth=3 + extra, keys=3, values=5 + extra) == value
        with pytest.raises(InvalidRequest, match="deeper"):
            parse_json(body, depth=2 + extra)
        with pytest.raises(InvalidRequest, match="keys"):
            parse_json(body, keys=2)
        with pytest.raises(InvalidRequest, match="values"):
            parse_json(body, values=4 + extra)


def test_brackets_in_strings_are_not_depth() -> None:
    value = {"a": "[" * 100, "b": '\\"[[[[[[[[[[', "c\\": ["{" * 50]}
    assert parse_json(json.dumps(value).encode(), depth=3) == value


def test_surrogate_pairs_are_characters() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


_ESCAPES = st.sampled_from([r"\ud83d", r"\uDE00", r"\u0041", r"\\", r"\\ud83d", "a", "ud83d"])


@pytest.mark.parametrize("piece_bytes", [1, 5, 6, 7, 11, 1000])
@given(st.lists(_ESCAPES, max_size=8).map("".join))
def test_lone_surrogates_are_found_wherever_pieces_end(piece_bytes: int, text: str) -> None:
    body = f'{{"a": "{text}"}}'.encode()
    value = json.loads(body)
    is_text = not any(0xD800 <= ord(character) < 0xE000 for character in value["a"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "MAX_BYTES_AT_ONCE", piece_bytes)
        if is_text:
            assert parse_json(body) == value
        else:
            with pytest.raises(InvalidRequest, match="surrogate"):
                parse_json(body)


async def test_large_bodies_are_parsed_one_at_a_time(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps the interpreter from the event loop for a while, all of them together for long."""
    running, most = 0, 0

    def slow(*_: object) -> dict[str, str]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return {"prompt": "Hi"}

    monkeypatch.setattr(body_module, "MAX_BYTES_AT_ONCE", 10)
    monkeypatch.setattr(body_module, "parse_json", slow)
    answers = await asyncio.gather(
        *(client.post(COMPLETIONS, content=GOOD, headers=JSON) for _ in range(8))
    )
    assert [answer.status_code for answer in answers] == [200] * 8
    assert most == 1


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(_JSON)
def test_strict_parsing_agrees_with_the_standard_parser(value: Any) -> None:
    text = json.dumps(value)
    if "NaN" in text or "Infinity" in text or "\\ud" in text:
        with contextlib.suppress(InvalidRequest):
            assert json.dumps(parse_json(text.encode())) == text
    else:
        assert json.dumps(parse_json(text.encode())) == text


_GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": [{"role": "u", "content": ""}]},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
}
_BODIES = (CompletionRequest, ChatCompletionRequest, ResponsesRequest, MessagesRequest)
_NAMES = sorted({name for body in _BODIES for name in body.model_fields})


@given(st.dictionaries(st.sampled_from(_NAMES), _JSON), st.sampled_from(sorted(_GOOD)))
@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_no_json_makes_a_500(
    client: httpx.AsyncClient, fields: dict[str, Any], url: str
) -> None:
    body = json.dumps({**_GOOD[url], **fields}).encode()
    response = await client.post(url, content=body, headers=JSON)
    assert response.status_code in (200, 400, 404, 413), response.text
    if response.status_code != 200:
        error_of(response, response.status_code)


@given(st.binary(max_size=200))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_no_bytes_make_a_500(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(COMPLETIONS, content=body, headers=JSON)
    error_of(response, 400)


async def test_a_body_is_counted_while_it_is_read(client: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        yield b'{"prompt": "'
        while True:
            yield b"x" * 500

    response = await client.post(COMPLETIONS, content=endless(), headers=JSON)
    assert error_of(response, 413)["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({**JSON, "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": 'Application/JSON; charset="UTF-8"'}, 200),
        ({**JSON, "X-Long": "x" * 1000}, 431),
        ({**JSON, **{f"X-{i}": "1" for i in range(20)}}, 431),
        ({**JSON, "Transfer-Encoding": "chunked", "Content-Length": "5"}, 400),
    ],
)
async def test_headers(client: httpx.AsyncClient, headers: dict[str, str], status: int) -> None:
    response = await client.post(COMPLETIONS, content=GOOD, headers=headers)
    if status == 200:
        assert response.status_code == 200
    else:
        error_of(response, status)
        assert response.headers["x-request-id"]


class TestKeys:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings.model_validate({"api_key": "old-key,néw-key"})

    @pytest.mark.parametrize(
        "value", [None, "", "Bearer", "Bearer ", "Bearer nope", "Basic old-key", "old-key"]
    )
    @pytest.mark.parametrize("url", [COMPLETIONS, "/v1/models", "/v1/cluster", "/nope"])
    async def test_refused_before_validation(
        self, client: httpx.AsyncClient, url: str, value: str | None
    ) -> None:
        headers = {} if value is None else {"Authorization": value}
        response = await client.post(url, content=b"not json", headers={**JSON, **headers})
        error = error_of(response, 401)
        assert error["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("key", ["old-key", "néw-key"])
    async def test_several_keys_are_valid(self, client: httpx.AsyncClient, key: str) -> None:
        headers = {b"Authorization": b"Bearer " + key.encode()}
        response = await client.post(COMPLETIONS, json={"prompt": "Hi"}, headers=headers)
        assert response.status_code == 200

    async def test_probes_need_no_key(self, client: httpx.AsyncClient) -> None:
        for url in ("/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json"):
            assert (await client.get(url)).status_code == 200, url


def test_without_keys_everything_is_open() -> None:
    assert Keys(()).accept(None)
    assert not Keys(("k",)).accept(None)


class TestTexts:
    """What a text costs to tokenize is bounded whatever the model's length is."""

    @pytest.fixture
    def limits(self) -> LimitSettings:
        return LimitSettings(max_text_chars=100)

    @pytest.mark.parametrize(
        ("url", "body", "param"),
        [
            (COMPLETIONS, {"prompt": "x" * 101}, "prompt"),
            (COMPLETIONS, {"prompt": ["x", "x" * 101]}, "prompt"),
            (CHAT, {"messages": [{"role": "user", "content": "x" * 101}]}, "messages"),
            ("/tokenize", {"prompt": "x" * 101}, "prompt"),
            ("/tokenize", {"messages": [{"role": "user", "content": "x" * 101}]}, "messages"),
            ("/v1/responses", {"input": "x" * 101}, "input"),
            (
                "/v1/messages/count_tokens",
                {"messages": [{"role": "user", "content": "x" * 101}]},
                "messages",
            ),
        ],
    )
    async def test_a_long_one(
        self, client: httpx.AsyncClient, url: str, body: dict[str, Any], param: str
    ) -> None:
        error = error_of(await client.post(url, json=body), 400)
        assert error["param"] == param
        assert "100" in error["message"]


@pytest.mark.parametrize("value", [2**31, 2**32, 2**63 - 1, -(2**63), 1e300])
async def test_numbers_of_any_size(client: httpx.AsyncClient, value: float) -> None:
    """What passes has a form on the wire: `FakeBackend` tries."""
    for name in CompletionRequest.model_fields:
        response = await client.post(COMPLETIONS, json={"prompt": "Hi", name: value})
        if response.status_code not in (200, 404):
            error_of(response, 400)
