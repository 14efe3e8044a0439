"""Structured output in the sampler: masks against a reference that knows all texts, and whole
outputs of a random model against `jsonschema`."""

import json
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from baton.engine.batch import GRAMMAR_FAILED, Sampled, SampleRequest
from baton.engine.row_edits import RowEdits
from baton.engine.sampler import Sampler
from baton.errors import InvalidRequest
from baton.grammar import Grammars
from baton.types import SamplingParams, StructuredKind, StructuredOutput
from tests.tiny_tokenizer import tiny_tokenizer

VOCAB, EOS = 320, 2
TOKENIZER = tiny_tokenizer()
GRAMMARS = Grammars(lambda: TOKENIZER, VOCAB, (EOS,))
CLOSING = {i: 3.0 for text in '"]},:0' for i in TOKENIZER.encode(text, add_special_tokens=False)}


def choice(*texts: str) -> StructuredOutput:
    return StructuredOutput(StructuredKind.CHOICE, json.dumps(texts))


def reference_mask(texts: list[str], output: list[int]) -> list[int]:
    """Token by token: can one of the texts go on like that?"""
    so_far = b"".join(TOKENIZER.token_bytes(i) for i in output)
    wanted = [text.encode() for text in texts]
    allowed = []
    for token_id in range(VOCAB):
        piece = TOKENIZER.token_bytes(token_id)
        is_text = piece and token_id not in TOKENIZER.special_ids
        if is_text and any(text.startswith(so_far + piece) for text in wanted):
            allowed.append(token_id)
    return sorted([*allowed, EOS] if so_far in wanted else allowed)


@given(
    batch=st.lists(
        st.tuples(
            st.lists(st.text("trueé{\"':n12l", min_size=1, max_size=6), min_size=1, max_size=4),
            st.integers(0, 99),
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=60, deadline=None)
def test_masks_allow_exactly_what_goes_on(batch: list[tuple[list[str], int]]) -> None:
    """Several rows at once, each followed to its end."""
    edits = RowEdits([EOS], GRAMMARS)
    rows = [
        (texts, SamplingParams(structured_outputs=choice(*texts), max_tokens=None), pick, [])
        for texts, pick in batch
    ]
    while rows:
        logits = torch.zeros(len(rows), VOCAB)
        requests = [SampleRequest(0, 0, len(o), params, (), o) for _, params, _, o in rows]
        assert edits.apply(logits, requests) == frozenset()
        for (texts, _, pick, output), row in zip(rows, logits, strict=True):
            allowed = row.isfinite().nonzero().flatten().tolist()
            assert allowed == reference_mask(texts, output)
            output.append(allowed[pick % len(allowed)])
        rows = [row for row in rows if row[3][-1] != EOS]


def test_a_new_sampler_goes_on_where_another_was() -> None:
    """After a preemption, a retry or a migration the output is replayed."""
    spec = StructuredOutput(StructuredKind.JSON_SCHEMA, '{"type": "array", "minItems": 3}')
    params = SamplingParams(structured_outputs=spec, seed=1, max_tokens=None)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    sampler, output = Sampler([EOS], GRAMMARS), []
    for _ in range(12):
        request = SampleRequest(0, 7, len(output), params, (), output)
        resumed = SampleRequest(0, 7, len(output), params, (), list(output))
        expected = Sampler([EOS], GRAMMARS).sample(logits, [(resumed,)])
        assert sampler.sample(logits, [(request,)]) == expected
        output.append(expected[0][0].token_id)


def test_output_that_fits_no_grammar_fails_its_request_alone() -> None:
    params = SamplingParams(structured_outputs=choice("true"), seed=1)
    wrong = SampleRequest(0, 7, 1, params, (), TOKENIZER.encode("x", add_special_tokens=False))
    right = SampleRequest(0, 7, 1, params, (), [])
    sampled = Sampler([EOS], GRAMMARS).sample(torch.zeros(2, VOCAB), [(wrong,), (right,)])
    assert sampled[0] == (Sampled(GRAMMAR_FAILED),)
    assert sampled[1][0].token_id >= 0
    (nobody,) = Sampler([EOS]).sample(torch.zeros(1, VOCAB), [(right,)])
    assert nobody == (Sampled(GRAMMAR_FAILED),)


def test_min_tokens_holds_back_eos_only_while_something_else_can_follow() -> None:
    edits = RowEdits([EOS], GRAMMARS)
    spec = StructuredOutput(StructuredKind.REGEX, "1*2?")
    params = SamplingParams(structured_outputs=spec, min_tokens=5)
    for text, may_end in (("", False), ("11", False), ("112", True)):
        output = [i for c in text for i in TOKENIZER.encode(c, add_special_tokens=False)]
        logits = torch.zeros(1, VOCAB)
        edits.apply(logits, [SampleRequest(0, 0, len(output), params, (), output)])
        assert bool(logits[0, EOS].isfinite()) == may_end
        assert bool(logits.isfinite().any())


# ── whole outputs ────────────────────────────────────────────────────────────────────────────────

_names = st.sampled_from(["a", "b", "é", "long name"])
_leaves = st.one_of(
    st.sampled_from(
        [
            {"type": "null"},
            {"type": "boolean"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "string", "maxLength": 8},
            {"type": "string", "pattern": "^[ab]{1,3}$"},
            {"type": "string", "format": "date"},
            {"const": {"x": [1, None, "é"]}},
        ]
    ),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-300, 300),
        st.integers(0, 50),
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(
            st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=3),
            min_size=1,
            max_size=4,
            unique_by=repr,
        ),
    ),
)


def _nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def to_object(properties: dict[str, Any], is_open: bool, num_required: int) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:num_required],
            **({} if is_open else {"additionalProperties": False}),
        }

    return st.one_of(
        st.builds(
            to_object, st.dictionaries(_names, inner, max_size=3), st.booleans(), st.integers(0, 3)
        ),
        st.builds(
            lambda items, low, more: {
                "type": "array",
                "items": items,
                "minItems": low,
                "maxItems": low + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(lambda kinds: {"anyOf": kinds}, st.lists(inner, min_size=1, max_size=3)),
    )


schemas = st.builds(
    lambda schema, one: {**schema, "$defs": {"one": one}},
    st.recursive(_leaves | st.just({"$ref": "#/$defs/one"}), _nest, max_leaves=6),
    _leaves,
)


def generate(schema: dict[str, Any], seed: int, max_tokens: int = 400) -> str | None:
    """What a model of random weights says: its logits are noise. None: not finished in time."""
    spec = StructuredOutput(StructuredKind.JSON_SCHEMA, json.dumps(schema), any_whitespace=False)
    params = SamplingParams(
        structured_outputs=spec, logit_bias=CLOSING, max_tokens=None, frequency_penalty=0.1
    )
    generator, sampler = torch.Generator().manual_seed(seed), Sampler([EOS], GRAMMARS)
    output: list[int] = []
    for _ in range(max_tokens):
        logits = torch.randn(1, VOCAB, generator=generator)
        ((sampled,),) = sampler.sample(
            logits, [(SampleRequest(0, seed, len(output), params, (), output),)]
        )
        assert sampled.token_id >= 0, sampled
        if sampled.token_id == EOS:
            return TOKENIZER.decode(output)
        output.append(sampled.token_id)
    return None


def is_served(schema: dict[str, Any]) -> bool:
    """Else it is refused, which is not what these tests are about."""
    spec = StructuredOutput(StructuredKind.JSON_SCHEMA, json.dumps(schema), any_whitespace=False)
    try:
        return GRAMMARS.matcher(spec) is not None
    except InvalidRequest:
        return False


def check(schema: dict[str, Any], seed: int) -> None:
    assume(is_served(schema))
    text = generate(schema, seed)
    assume(text is not None)
    assert text is not None
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


@given(schema=schemas, seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_outputs_of_a_random_model_validate(schema: dict[str, Any], seed: int) -> None:
    check(schema, seed)


@pytest.mark.slow
@given(schema=schemas, seed=st.integers(0, 999))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_outputs_of_a_random_model_validate_many(schema: dict[str, Any], seed: int) -> None:
    check(schema, seed)


@given(data=st.data(), schema=schemas)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_validates_is_allowed(data: st.DataObject, schema: dict[str, Any]) -> None:
    """The other direction: a grammar that refuses valid texts would pass the test above."""
    assume(is_served(schema))
    matcher = GRAMMARS.matcher(StructuredOutput(StructuredKind.JSON_SCHEMA, json.dumps(schema)))
    value = data.draw(values_of(schema, schema["$defs"]["one"]))
    jsonschema.validate(value, schema)
    text = json.dumps(value, ensure_ascii=False)
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert matcher.try_consume_tokens(ids) == len(ids), text
    assert matcher.is_accepting(), text


def values_of(schema: dict[str, Any], ref: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of the schemas above; objects in the schema's order, which is the grammar's too."""
    match schema:
        case {"$ref": _}:
            return values_of(ref, ref)
        case {"anyOf": kinds}:
            return st.one_of([values_of(kind, ref) for kind in kinds])
        case {"enum": values}:
            return st.sampled_from(values)
        case {"const": value}:
            return st.just(value)
        case {"type": "integer", **rest}:
            return st.integers(rest.get("minimum"), rest.get("maximum"))
        case {"type": "array", "items": items}:
            low, high = schema["minItems"], schema["maxItems"]
            return st.lists(values_of(items, ref), min_size=low, max_size=high)
        case {"type": "object", "properties": known, "required": required}:
            every = st.fixed_dictionaries(
                {name: values_of(one, ref) for name, one in known.items()}
            )
            some = st.sets(st.sampled_from(sorted(known))) if known else st.just(set())
            return st.builds(
                lambda value, kept: {
                    name: value[name] for name in known if name in kept or name in required
                },
                every,
                some,
            )
    return {
        "null": st.none(),
        "boolean": st.booleans(),
        "number": st.floats(allow_nan=False, allow_infinity=False),
        "string": st.from_regex(schema["pattern"], fullmatch=True)
        if "pattern" in schema
        else st.dates().map(str)
        if "format" in schema
        else st.text(st.characters(codec="utf-8"), max_size=schema.get("maxLength")),
    }[schema["type"]]
