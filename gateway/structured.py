"""Structured output over HTTP: what `response_format` and `structured_outputs` ask for, and whether
it can be had, found out before a worker sees the request."""

import json
from collections.abc import Mapping
from typing import Any

from baton.errors import InvalidRequest
from baton.gateway.backend import ServedModel
from baton.grammar import Grammars
from baton.grammar_pool import GrammarPool
from baton.text import Tokenizer
from baton.types import StructuredKind, StructuredOutput

_KINDS = {
    "json": StructuredKind.JSON_SCHEMA,
    "regex": StructuredKind.REGEX,
    "choice": StructuredKind.CHOICE,
    "grammar": StructuredKind.GRAMMAR,
    "json_object": StructuredKind.JSON_OBJECT,
    "structural_tag": StructuredKind.STRUCTURAL_TAG,
}
_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


def of_response_format(value: Mapping[str, Any]) -> StructuredOutput | None:
    """OpenAI's `response_format`, with vLLM's `structural_tag`; None: text.

    Raises:
        InvalidRequest: param `response_format`.
    """
    match value:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return StructuredOutput(StructuredKind.JSON_OBJECT)
        case {"type": "json_schema", "json_schema": {"schema": dict() | bool() as schema}}:
            return _spec(StructuredKind.JSON_SCHEMA, schema, "response_format")
        case {"type": "structural_tag"}:
            return _spec(StructuredKind.STRUCTURAL_TAG, dict(value), "response_format")
        case {"type": "json_schema"}:
            raise InvalidRequest("json_schema needs json_schema.schema.", "response_format")
    raise InvalidRequest(
        "type must be text, json_object, json_schema or structural_tag.", "response_format"
    )


def of_structured_outputs(value: Mapping[str, Any]) -> StructuredOutput:
    """vLLM's `structured_outputs`: exactly one of json, regex, choice, grammar, json_object,
    structural_tag, and options.

    Raises:
        InvalidRequest: param `structured_outputs`.
    """
    param = "structured_outputs"
    given = {name: item for name, item in value.items() if item not in (None, False)}
    options = {name: given.pop(name) for name in _OPTIONS if name in given}
    if unknown := given.keys() - _KINDS.keys():
        raise InvalidRequest(f"has {len(unknown)} unknown fields.", param)
    if len(given) != 1:
        raise InvalidRequest(f"needs exactly one of {', '.join(_KINDS)}.", param)
    ((name, item),) = given.items()
    _check_type(name, item)
    kind = _KINDS[name]
    if options:
        if kind not in (StructuredKind.JSON_SCHEMA, StructuredKind.JSON_OBJECT):
            raise InvalidRequest(f"{', '.join(options)}: only with json and json_object.", param)
        item = _with_options(_parsed(item) if name == "json" else {"type": "object"}, options)
        kind = StructuredKind.JSON_SCHEMA
    return _spec(kind, item, param, any_whitespace="disable_any_whitespace" not in options)


def _check_type(name: str, item: object) -> None:
    kinds: dict[str, type | tuple[type, ...]] = {
        "json": (str, dict, bool),
        "choice": list,
        "json_object": bool,
        "structural_tag": (str, dict),
    }
    if not isinstance(item, kinds.get(name, str)):
        raise InvalidRequest(f"{name} has the wrong type.", "structured_outputs")


def _parsed(schema: object) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise InvalidRequest("json is not a JSON schema.", "structured_outputs") from None


def _with_options(schema: Any, options: Mapping[str, Any]) -> Any:
    if "disable_additional_properties" in options:
        schema = _closed(schema)
    pattern = options.get("whitespace_pattern")
    if pattern is not None:
        if not isinstance(pattern, str) or not isinstance(schema, dict):
            raise InvalidRequest("whitespace_pattern is a text.", "structured_outputs")
        schema = {**schema, "x-guidance": {"whitespace_pattern": pattern}}
    return schema


def _closed(schema: Any) -> Any:
    """The schema with additionalProperties: false wherever it names properties and does not say."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(item) for name, item in schema.items()}
    names = {"properties", "patternProperties"} & schema.keys()
    if names and not {"additionalProperties", "unevaluatedProperties"} & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _spec(
    kind: StructuredKind, item: object, param: str, *, any_whitespace: bool = True
) -> StructuredOutput:
    if kind is StructuredKind.JSON_OBJECT:
        text = ""
    else:
        text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    try:
        return StructuredOutput(kind, text, any_whitespace)
    except InvalidRequest as error:
        raise InvalidRequest(error.message.replace("structured_outputs", param), param) from None


class GrammarChecks:
    """Compiles what requests bring, as workers will, and refuses what does not compile."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, tuple[int, ...]], GrammarPool] = {}

    async def check(
        self,
        spec: StructuredOutput,
        model: ServedModel,
        tokenizer: Tokenizer,
        param: str = "structured_outputs",
    ) -> None:
        """
        Raises:
            InvalidRequest: it means nothing, nothing fits it, or it is too complex; of `param`.
            BatonError: OVERLOADED.
        """
        key = model.vocab_size, model.eos_token_ids
        if key not in self._pools:
            self._pools[key] = GrammarPool(Grammars(lambda: tokenizer, *key))
        try:
            await self._pools[key].prepare(spec)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param, error.cause) from None

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
