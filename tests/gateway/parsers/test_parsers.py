"""Text of an answer → content, reasoning, calls: the same however the text is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.parsers.pieces import Arguments, CallStart, Content, Parser, Reasoning
from baton.gateway.parsers.reasoning import REASONING_PARSERS
from baton.gateway.parsers.tools import TOOL_PARSERS, NamedCall, RequiredCalls

Calls = list[tuple[str, str]]


def run(parser: Parser, parts: list[str]) -> tuple[str, str, Calls]:
    """(content, reasoning, calls as (name, arguments))."""
    content, reasoning, calls = "", "", []
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    for piece in pieces:
        match piece:
            case Content(text):
                assert text
                content += text
            case Reasoning(text):
                assert text
                reasoning += text
            case CallStart(name):
                calls.append((name, ""))
            case Arguments(text):
                assert text
                name, before = calls[-1]
                calls[-1] = (name, before + text)
    return content, reasoning, calls


WEATHER = '{"city": "Z\\u00fcrich {[\\"x\\"]}", "days": 3}'
TABLE: list[tuple[str, str, str, Calls]] = [
    ("hermes", "plain <tool text", "plain <tool text", []),
    (
        "hermes",
        f'Let me see.<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>',
        "Let me see.",
        [("weather", WEATHER)],
    ),
    (
        "hermes",
        '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n'
        '<tool_call>{"arguments": {"x": 1}, "name": "b"}</tool_call>',
        "",
        [("a", "{}"), ("b", '{"x": 1}')],
    ),
    ("hermes", '<tool_call>{"name": "a"}</tool_call>bye', "bye", [("a", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        "",
        [("a", '{"x": 1}')],
    ),
    ("hermes", "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x"', "", [("a", '{"x"')]),
    ("llama3_json", f'{{"name": "f", "parameters": {WEATHER}}}', "", [("f", WEATHER)]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {"a": [1, 2]}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"a": [1, 2]}'), ("g", "{}")],
    ),
    ("llama3_json", ' {"temperature": 3}', ' {"temperature": 3}', []),
    ("llama3_json", "Hello, {world}", "Hello, {world}", []),
    ("llama3_json", "<|py", "<|py", []),
    (
        "mistral",
        'Sure. [TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, '
        '{"name": "g", "arguments": {}}]',
        "Sure. ",
        [("f", '{"a": "]"}'), ("g", "{}")],
    ),
    (
        "mistral",
        '[TOOL_CALLS]f{"a": {"b": 1}}[TOOL_CALLS]g[ARGS]{"c": 2}',
        "",
        [("f", '{"a": {"b": 1}}'), ("g", '{"c": 2}')],
    ),
    ("mistral", "just text [TOOL", "just text [TOOL", []),
    (
        "pythonic",
        "[weather(city='Z\u00fcrich', days=[1, 2]), now()]",
        "",
        [("weather", json.dumps({"city": "Z\u00fcrich", "days": [1, 2]})), ("now", "{}")],
    ),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[f(x)]", "[f(x)]", []),
    ("pythonic", "[f(", "[f(", []),
    ("pythonic", "no list", "no list", []),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), TABLE)
def test_tools(name: str, text: str, content: str, calls: Calls) -> None:
    assert run(TOOL_PARSERS[name](), [text]) == (content, "", calls)
    assert run(TOOL_PARSERS[name](), list(text)) == (content, "", calls)


@given(
    st.sampled_from(TABLE), st.lists(st.integers(0, 120), max_size=6), st.sampled_from(["", "x"])
)
def test_cuts_do_not_matter(
    case: tuple[str, str, str, Calls], cuts: list[int], prefix: str
) -> None:
    name, text = case[0], prefix + case[1]
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(bounds)]
    assert run(TOOL_PARSERS[name](), parts) == run(TOOL_PARSERS[name](), [text])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(
        st.tuples(st.text(min_size=1), st.dictionaries(st.text(), json_values, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([None, 1, "\t"]),
    st.data(),
)
def test_any_call_survives(
    calls: list[tuple[str, dict[str, object]]], indent: int | str | None, data: st.DataObject
) -> None:
    text = json.dumps([{"name": n, "parameters": a} for n, a in calls], indent=indent)
    cut = data.draw(st.integers(0, len(text)))
    content, _, found = run(RequiredCalls(), [text[:cut], text[cut:]])
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(st.text())
def test_nothing_that_is_no_call_is_lost(text: str) -> None:
    for name in ("hermes", "llama3_json", "pythonic"):
        if not any(mark in text for mark in ("<tool_call>", "{", "[", "<|python_tag|>")):
            assert run(TOOL_PARSERS[name](), list(text)) == (text, "", [])


def test_a_named_tool() -> None:
    assert run(NamedCall("f"), ['{"a"', "", ": 1}"]) == ("", "", [("f", '{"a": 1}')])


THINK = "Is it <b> 1 </thin"
PROMPTS = {"open": "…<think>\n", "closed": "…<think>\n\n</think>\n\n", "neither": "assistant\n"}


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("deepseek_r1", "neither", f"{THINK}</think>\n\nYes", THINK, "\n\nYes"),
        ("deepseek_r1", "neither", f"<think>{THINK}</think>Yes", THINK, "Yes"),
        ("deepseek_r1", "neither", THINK, THINK, ""),
        ("deepseek_r1", "closed", "Yes </think>", "", "Yes </think>"),
        ("qwen3", "neither", f"\n<think>{THINK}</think>Yes", THINK, "Yes"),
        ("qwen3", "neither", "Yes <think>", "", "Yes <think>"),
        ("qwen3", "neither", "<thin", "", "<thin"),
        ("qwen3", "open", f"{THINK}</think>Yes", THINK, "Yes"),
        ("qwen3", "closed", "Yes", "", "Yes"),
        ("qwen3", "neither", "  ", "", "  "),
    ],
)
def test_reasoning(name: str, prompt: str, text: str, reasoning: str, content: str) -> None:
    for parts in ([text], list(text)):
        parser = REASONING_PARSERS[name](PROMPTS[prompt])
        assert run(parser, parts) == (content, reasoning, [])
