"""Bodies to specifications, and the check in front of the workers."""

import json
from typing import Any

import pytest

from baton.errors import InvalidRequest
from baton.gateway.backend import ServedModel
from baton.gateway.structured import GrammarChecks, of_response_format, of_structured_outputs
from baton.types import StructuredKind, StructuredOutput
from tests.tiny_tokenizer import tiny_tokenizer

KIND = StructuredKind
SCHEMA = {"type": "object", "properties": {"é": {"properties": {"a": {}}}}}


def test_response_formats() -> None:
    assert of_response_format({"type": "text"}) is None
    assert of_response_format({"type": "json_object"}) == StructuredOutput(KIND.JSON_OBJECT)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    found = of_response_format(schema)
    assert found is not None
    assert (found.kind, json.loads(found.text)) == (KIND.JSON_SCHEMA, SCHEMA)
    tag = {"type": "structural_tag", "structures": [], "triggers": []}
    found = of_response_format(tag)
    assert found is not None
    assert (found.kind, json.loads(found.text)) == (KIND.STRUCTURAL_TAG, tag)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": "{}"}},
        {"type": "json_schema", "json_schema": {"schema": {"description": "x" * 70_000}}},
    ],
)
def test_bad_response_formats(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        of_response_format(value)
    assert caught.value.param == "response_format"
    assert "structured_outputs" not in caught.value.message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"json": SCHEMA}, (KIND.JSON_SCHEMA, json.dumps(SCHEMA, ensure_ascii=False), True)),
        ({"json": "{}"}, (KIND.JSON_SCHEMA, "{}", True)),
        ({"regex": "a+", "json": None}, (KIND.REGEX, "a+", True)),
        ({"choice": ["é", "b"]}, (KIND.CHOICE, '["é", "b"]', True)),
        ({"grammar": 'start: "a"'}, (KIND.GRAMMAR, 'start: "a"', True)),
        ({"json_object": True}, (KIND.JSON_OBJECT, "", True)),
        (
            {"json_object": True, "disable_any_whitespace": True},
            (KIND.JSON_SCHEMA, '{"type": "object"}', False),
        ),
        ({"regex": "a", "disable_any_whitespace": False}, (KIND.REGEX, "a", True)),
        ({"structural_tag": {"a": 1}}, (KIND.STRUCTURAL_TAG, '{"a": 1}', True)),
    ],
)
def test_structured_outputs(value: Any, expected: tuple[KIND, str, bool]) -> None:
    assert of_structured_outputs(value) == StructuredOutput(*expected)


def test_options_change_the_schema() -> None:
    options = {"disable_additional_properties": True, "whitespace_pattern": " ?"}
    found = json.loads(of_structured_outputs({"json": SCHEMA, **options}).text)
    assert found["additionalProperties"] is False
    assert found["properties"]["é"]["additionalProperties"] is False
    assert "additionalProperties" not in found["properties"]["é"]["properties"]["a"]
    assert found["x-guidance"] == {"whitespace_pattern": " ?"}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"json": {}, "regex": "a"},
        {"foo": 1},
        {"regex": 5},
        {"choice": "a"},
        {"json": [1]},
        {"json_object": 1},
        {"regex": "a", "disable_any_whitespace": True},
        {"json": "{", "disable_additional_properties": True},
        {"json": {}, "whitespace_pattern": 5},
        {"regex": "a" * 5000},
    ],
)
def test_bad_structured_outputs(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        of_structured_outputs(value)
    assert caught.value.param == "structured_outputs"


async def test_what_does_not_compile_is_refused_under_the_fields_name() -> None:
    checks = GrammarChecks()
    model = ServedModel("m", 100, 320, (2,))
    for param in ("response_format", "structured_outputs"):
        with pytest.raises(InvalidRequest) as caught:
            await checks.check(StructuredOutput(KIND.REGEX, "(("), model, tiny_tokenizer(), param)
        assert caught.value.param == param
    await checks.check(StructuredOutput(KIND.REGEX, "a"), model, tiny_tokenizer())
    checks.close()
