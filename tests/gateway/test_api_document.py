"""docs/api.md says what is there: every field of the bodies, every limit, every route; what it
refuses is refused, and what it does not know is ignored."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from baton.gateway.backend import ServedModel
from baton.gateway.chat_fields import ChatFields
from baton.gateway.fields import Fields
from baton.gateway.message_fields import CountTokensRequest, MessagesRequest
from baton.gateway.openai import ChatCompletionRequest, CompletionRequest
from baton.gateway.pooling_fields import EmbeddingRequest, RerankRequest, ScoreRequest
from baton.gateway.responses.fields import ResponsesRequest
from baton.gateway.token_io import GenerateRequest, TokenSampling
from baton.gateway.tokenization import DetokenizeRequest, TokenizeRequest
from baton.pooling import PoolingInfo, PoolingTask
from baton.settings import LimitSettings
from tests.gateway.fakes import FakeBackend

DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
BODIES = {
    "C": (CompletionRequest,),
    "H": (ChatCompletionRequest,),
    "G": (GenerateRequest, TokenSampling),
    "E": (EmbeddingRequest,),
    "S": (ScoreRequest,),
    "R": (RerankRequest,),
}


def documented() -> dict[str, set[str]]:
    """C, H, G → the fields that the table gives it."""
    fields: dict[str, set[str]] = {letter: set() for letter in BODIES}
    for line in DOCUMENT.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and set(cells[1].split()) <= BODIES.keys():
            for letter in cells[1].split():
                fields[letter] |= set(re.findall(r"`(\w+)`", cells[0]))
    return fields


@pytest.mark.parametrize("letter", BODIES)
def test_every_field_is_listed(letter: str) -> None:
    fields = {name for body in BODIES[letter] for name in body.model_fields}
    assert documented()[letter] == fields


def test_every_refused_field_is_listed() -> None:
    refused = set(re.findall(r"`(\w+)`", DOCUMENT.split("Refused by name:")[1].split("\n\n")[0]))
    known = CompletionRequest.refused.keys() | ChatCompletionRequest.refused.keys()
    assert refused == known


def test_every_field_of_responses_is_listed() -> None:
    section = DOCUMENT.split("\n## Responses\n")[1].split("\n## ")[0]
    table, refused = section.split("\nRefused: ")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"`(\w+)`", "".join(rows)))
    assert listed == ResponsesRequest.model_fields.keys()
    assert ResponsesRequest.refused.keys() <= set(re.findall(r"`(\w+)`", refused.split(";")[0]))


@pytest.mark.parametrize(
    ("title", "body"), [("Messages", MessagesRequest), ("Tokens", DetokenizeRequest)]
)
def test_every_field_is_named(title: str, body: type[Fields]) -> None:
    section = DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert body.model_fields.keys() | body.refused.keys() <= named | {"model"}


def test_every_field_of_tokenize_is_named() -> None:
    section = DOCUMENT.split("\n## Tokens\n")[1].split("\n## ")[0]
    own = TokenizeRequest.model_fields.keys() - ChatFields.model_fields.keys()
    assert own <= set(re.findall(r"`(\w+)`", section)) | {"model"}
    assert ChatFields.model_fields.keys() <= documented()["H"]


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
ROUTES: dict[str, tuple[type[Fields], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "Hi"}),
    "/v1/chat/completions": (ChatCompletionRequest, CHAT),
    "/v1/messages": (MessagesRequest, {**CHAT, "max_tokens": 2}),
    "/v1/messages/count_tokens": (CountTokensRequest, CHAT),
    "/v1/responses": (ResponsesRequest, {"input": "Hi"}),
    "/inference/v1/generate": (GenerateRequest, {"token_ids": [5]}),
    "/tokenize": (TokenizeRequest, {"prompt": "Hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
    "/v1/embeddings": (EmbeddingRequest, {"model": "pooler", "input": "Hi"}),
    "/score": (ScoreRequest, {"model": "pooler", "text_1": "a", "text_2": "b"}),
    "/rerank": (RerankRequest, {"model": "pooler", "query": "a", "documents": ["b"]}),
}


@pytest.mark.parametrize("url", ROUTES)
async def test_unknown_and_refused_fields(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel, url: str
) -> None:
    pooling = PoolingInfo(PoolingTask.EMBED, 4)
    backend.served = (model, replace(model, name="pooler", pooling=pooling))
    kind, body = ROUTES[url]
    response = await client.post(url, json={**body, "nobody_knows_it": [{"a": 1}]})
    assert response.status_code == 200, response.text
    for name, harmless in kind.refused.items():
        response = await client.post(url, json={**body, name: {"some": "thing"}})
        assert response.status_code == 400, name
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported")
        for value in (None, *harmless):
            response = await client.post(url, json={**body, name: value})
            assert response.status_code == 200, response.text


def test_every_limit_is_listed() -> None:
    flags = {f"--{name.replace('_', '-')}" for name in LimitSettings.model_fields}
    assert flags <= set(re.findall(r"`(--[\w-]+)`", DOCUMENT))


def test_every_route_is_listed(app: FastAPI) -> None:
    missing = [path for path in app.openapi()["paths"] if f"`{path}`" not in DOCUMENT]
    assert not missing
