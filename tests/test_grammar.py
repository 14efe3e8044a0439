"""What specifications mean, and how bad ones are refused."""

import asyncio
import json
import threading
from contextlib import suppress
from typing import Any

import pytest

from baton.errors import Cause, InvalidRequest
from baton.grammar import Grammars
from baton.grammar_pool import GrammarPool
from baton.types import StructuredKind, StructuredOutput
from tests.tiny_tokenizer import tiny_tokenizer

KIND = StructuredKind
VOCAB, EOS = 320, 2
TAG = {
    "structures": [{"begin": "<f=a>", "schema": {"type": "object"}, "end": "</f>"}],
    "triggers": ["<f="],
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer, VOCAB, (EOS,))


def accepts(grammars: Grammars, spec: StructuredOutput, text: str) -> bool:
    matcher = grammars.matcher(spec)
    ids = tiny_tokenizer().encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        (KIND.JSON_OBJECT, "", '{"a": [1, {}]}', "[]"),
        (KIND.JSON_SCHEMA, '{"type": "integer", "minimum": 3}', "12", "2"),
        (KIND.JSON_SCHEMA, "true", "[null]", "[nul]"),
        (KIND.REGEX, r"\d{2}-[a-c]+", "12-abc", "12-abcd"),
        (KIND.CHOICE, json.dumps(["é\n", '"q"', "𝄞\\t"]), "𝄞\\t", "é"),
        (KIND.GRAMMAR, 'root ::= "a" root | "b"', "aab", "aa"),
        (KIND.GRAMMAR, 'start: "a" start | "b"', "aab", "aa"),
        (KIND.STRUCTURAL_TAG, json.dumps(TAG), "x <f=a>{}</f> y", "x <f=b>{}</f>"),
    ],
)
def test_kinds(grammars: Grammars, kind: KIND, text: str, good: str, bad: str) -> None:
    spec = StructuredOutput(kind, text)
    assert accepts(grammars, spec, good)
    assert not accepts(grammars, spec, bad)


@pytest.mark.timeout(20)  # where it does not end, it cannot be interrupted either
@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("start: /a+/ start", ""),
        ("start: /a+/ x\nx: /a+/", ""),
        ('start: ("x" | "y") /a+/ x\nx: /a+/', "x"),
        ('%llguidance {"no_forcing": false}\nstart: "x"? /a+/ start', ""),
        ('start: %lark {\n%llguidance {"no_forcing": false}\nstart: /a+/ start\n}', ""),
    ],
)
def test_a_text_without_end_is_not_looked_ahead(grammars: Grammars, text: str, start: str) -> None:
    matcher = grammars.matcher(StructuredOutput(KIND.GRAMMAR, text))
    for char in [*start, *"aaa"]:
        (token_id,) = tiny_tokenizer().encode(char, add_special_tokens=False)
        mask = matcher.compute_bitmask()
        assert mask[token_id // 8] >> token_id % 8 & 1
        assert matcher.consume_token(token_id)


def test_whitespace_is_optional(grammars: Grammars) -> None:
    loose, compact = (StructuredOutput(KIND.JSON_OBJECT, "", any_ws) for any_ws in (True, False))
    assert accepts(grammars, loose, '{ "a":1 }')
    assert accepts(grammars, compact, '{"a":1}')
    assert not accepts(grammars, compact, '{"a": 1}')


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (KIND.REGEX, "(("),
        (KIND.REGEX, r"(a)\1"),
        (KIND.REGEX, "(?=a)b"),
        (KIND.JSON_SCHEMA, "{"),
        (KIND.JSON_SCHEMA, "[]"),
        (KIND.JSON_SCHEMA, "false"),
        (KIND.JSON_SCHEMA, '{"type": "foo"}'),
        (KIND.JSON_SCHEMA, '{"if": {}}'),
        (KIND.JSON_SCHEMA, '{"$ref": "http://example.com/"}'),
        (KIND.JSON_SCHEMA, '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
        (KIND.JSON_SCHEMA, '{"a":' * 33 + "1" + "}" * 33),
        (KIND.JSON_SCHEMA, "[" * 30_000),
        (KIND.CHOICE, "[]"),
        (KIND.CHOICE, '["a", ""]'),
        (KIND.CHOICE, '"ab"'),
        (KIND.GRAMMAR, "start: x"),
        (KIND.GRAMMAR, "(" * 10_000),
        (KIND.STRUCTURAL_TAG, "{}"),
        (KIND.STRUCTURAL_TAG, json.dumps({**TAG, "triggers": ["<g"]})),
        (KIND.STRUCTURAL_TAG, json.dumps({**TAG, "structures": [{"begin": "<f=a>"}]})),
    ],
)
def test_what_means_nothing_is_refused(grammars: Grammars, kind: KIND, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammars.matcher(StructuredOutput(kind, text))
    assert caught.value.param == "structured_outputs"
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (KIND.REGEX, "(((a{1,100}){1,100}){1,100}){1,100}"),
        (KIND.REGEX, ".{0,100000}"),
        (KIND.REGEX, "(.*a.{30}b)*"),
        (KIND.JSON_SCHEMA, json.dumps({"enum": [str(i) * 3 for i in range(4000)]})),
        (KIND.JSON_SCHEMA, '{"type": "array", "minItems": 1000000}'),
        (KIND.JSON_SCHEMA, '{"type": "string", "maxLength": 100000000}'),
        (
            KIND.JSON_SCHEMA,
            json.dumps({"properties": {f"p{i}": {"pattern": "(a|b){50}"} for i in range(999)}}),
        ),
        (
            KIND.JSON_SCHEMA,
            json.dumps(
                {
                    "allOf": [
                        {"oneOf": [{"properties": {f"{i}{j}": {}}} for j in range(20)]}
                        for i in range(20)
                    ]
                }
            ),
        ),
    ],
)
def test_bombs_compile_or_are_refused_soon(grammars: Grammars, kind: KIND, text: str) -> None:
    """pytest-timeout is the limit; the pool's own is tested below."""
    with suppress(InvalidRequest):
        grammars.matcher(StructuredOutput(kind, text)).compute_bitmask()


def test_a_matcher_is_the_callers_own(grammars: Grammars) -> None:
    spec = StructuredOutput(KIND.REGEX, "ab")
    one, other = grammars.matcher(spec), grammars.matcher(spec)
    assert spec in grammars
    assert one.consume_token(tiny_tokenizer().encode("a", add_special_tokens=False)[0])
    assert one.compute_bitmask() != other.compute_bitmask()


def test_without_tokenizer_or_eos_it_is_unsupported() -> None:
    for grammars in (Grammars(None, VOCAB, (EOS,)), Grammars(tiny_tokenizer, VOCAB, ())):
        with pytest.raises(InvalidRequest) as caught:
            grammars.matcher(StructuredOutput(KIND.JSON_OBJECT))
        assert caught.value.cause is Cause.UNSUPPORTED


class SlowGrammars(Grammars):
    def __init__(self) -> None:
        super().__init__(tiny_tokenizer, VOCAB, (EOS,))
        self.go_on = threading.Event()

    def compile(self, spec: StructuredOutput) -> Any:
        if spec.text == "slow":
            self.go_on.wait(30)
        return super().compile(spec)


async def test_the_pool_waits_no_longer_than_its_limit_and_serves_others() -> None:
    slow, fast = (StructuredOutput(KIND.REGEX, text) for text in ("slow", "fast"))
    grammars = SlowGrammars()
    pool = GrammarPool(grammars, compile_s=0.05)
    await pool.prepare(StructuredOutput(KIND.REGEX, "first"))  # loads the tokenizer
    waiting = asyncio.create_task(pool.prepare(slow))
    await asyncio.sleep(0)
    await pool.prepare(fast)
    assert fast in grammars
    with pytest.raises(InvalidRequest, match="too long"):
        await waiting
    grammars.go_on.set()
    pool.close()


def test_large_grammars_make_room_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Grammars(tiny_tokenizer, VOCAB, (EOS,))
    small, *large = [
        StructuredOutput(KIND.CHOICE, json.dumps([letter * length]))
        for letter, length in (("a", 10), ("b", 400), ("c", 400), ("d", 400))
    ]
    monkeypatch.setattr("baton.grammar.MAX_CACHED_CHARS", 1000)
    for spec in (small, *large[:2], small):
        made.matcher(spec)
    assert all(spec in made for spec in (small, *large[:2]))
    made.matcher(large[2])
    assert [spec in made for spec in (small, *large)] == [True, False, True, True]
    monkeypatch.setattr("baton.grammar.MAX_CACHED", 2)
    made.matcher(large[0])
    assert [spec in made for spec in (small, *large)] == [False, True, False, True]
