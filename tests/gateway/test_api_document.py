"""docs/api.md says what is there: every field of the bodies, every limit, every route."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI

from baton.gateway.openai import ChatCompletionRequest, CompletionRequest
from baton.gateway.pooling_fields import EmbeddingRequest, RerankRequest, ScoreRequest
from baton.gateway.responses.fields import ResponsesRequest
from baton.gateway.token_io import GenerateRequest, TokenSampling
from baton.settings import LimitSettings

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


def test_every_limit_is_listed() -> None:
    flags = {f"--{name.replace('_', '-')}" for name in LimitSettings.model_fields}
    assert flags <= set(re.findall(r"`(--[\w-]+)`", DOCUMENT))


def test_every_route_is_listed(app: FastAPI) -> None:
    missing = [path for path in app.openapi()["paths"] if f"`{path}`" not in DOCUMENT]
    assert not missing
