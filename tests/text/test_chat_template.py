from typing import Any

import pytest

from baton.errors import Cause, InvalidRequest
from baton.text import ChatTemplate, Tokenizer

USER = [{"role": "user", "content": "hi"}]


def template(source: str, **special: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, special)


def test_blocks_are_trimmed_and_special_tokens_known() -> None:
    source = "{{ bos_token }}\n  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\nend"
    assert template(source, bos_token="<s>").render(USER) == "<s>\nhi\nend"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'b': 'é<>', 'a': 1} | tojson }}", '{"b": "é<>", "a": 1}'),
        ("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}x{{ messages[0].content }}{% endgeneration %}y", "xhiy"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ messages[0]['content'].strip().split('h')[-1] }}", "i"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ thinking }}", "False"),
    ],
)
def test_what_hugging_face_templates_use(source: str, expected: str) -> None:
    assert template(source).render(USER, variables={"thinking": False}) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.foo }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_fails_is_the_request_s_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template(source).render(USER)
    assert caught.value.param == "messages"
    assert caught.value.cause is Cause.INVALID_REQUEST


def test_the_template_s_own_words_reach_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(USER)


def test_a_template_that_does_not_compile_is_refused_at_load() -> None:
    with pytest.raises(ValueError, match="line 2"):
        template("ok\n{% for %}")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"content": "no role"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"text": "no type"}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": ["f"]}],
        ["hi"],
    ],
)
def test_malformed_messages_are_refused(messages: list[Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template("{{ messages }}").render(messages)
    assert caught.value.param == "messages"


def test_messages_take_the_form_templates_expect() -> None:
    source = "{% for m in messages %}[{{ m.content }}"
    source += "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.x }}{% endif %}]"
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call]}]
    source += "{% endfor %}"
    assert template(source).render(messages) == "[a\nb][1]"
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}  # the caller's stays


def test_tools_choose_their_template() -> None:
    both = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].name }}"}, {})
    assert both.render(USER) == "plain"
    assert both.render(USER, tools=[{"name": "f"}]) == "f"


def test_variables_cannot_replace_the_conversation() -> None:
    text = template("{{ messages[0].content }}").render(USER, variables={"messages": "x"})
    assert text == "hi"


def test_continue_final_message(tokenizer: Tokenizer) -> None:
    messages = [*USER, {"role": "assistant", "content": "The answer is "}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    prompt = tokenizer.render_chat(messages, **options)
    assert prompt == "<|user|>hi<|end|><|assistant|>The answer is "
    trimming = template("{{ bos }}{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert trimming.render(messages, **options) == "[hi][The answer is"
    with pytest.raises(InvalidRequest, match="exclude"):
        tokenizer.render_chat(messages, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="drops the last message"):
        template("{{ messages[0].content }}").render(messages, **options)


def refused(source: str, messages: list[Any] = USER, **variables: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        template(source).render(messages, variables=variables)
    assert caught.value.param == "messages"
    return caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * (n * n) }}",
        "{{ [1] * n * n }}",
        "{{ n ** n }}",
        "{% for i in range(n) %}{% for j in range(n) %}{{ s }}{% endfor %}{% endfor %}",
        "{% for i in range(n * n) %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    ],
)
def test_neither_size_nor_reach_is_unbounded(source: str) -> None:
    refused(source, n=90_000, s="x" * 10_000)


def test_rendering_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.text.chat_template.MAX_RENDER_S", 0.05)
    refused("{% for i in range(9000) %}{% for j in range(9000) %}x{% endfor %}{% endfor %}")


def test_what_messages_say_is_not_repeated() -> None:
    canary = "CANARY" * 100
    messages = [{"role": "user", "content": canary, canary: 1}]
    for source in ("{{ messages[0].content + 1 }}", "{{ messages[0].content.nope() }}"):
        assert "CANARY" not in refused(source, messages)
    assert len(refused("{{ raise_exception(messages[0].content) }}", messages)) < 300


@pytest.mark.parametrize(
    "arguments", ["[" * 100_000, "{", '{"a": "\\ud800"}', '"' + "9" * 5000, "9" * 5000]
)
def test_arguments_that_only_look_like_json(arguments: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    refused("{{ messages[0].tool_calls[0].function.arguments | tojson }}", [message])


@pytest.mark.parametrize("calls", [5, "x", {"a": 1}, [5], [{}], [{"function": 1}]])
def test_tool_calls_that_are_none(calls: Any) -> None:
    refused("{{ messages }}", [{"role": "assistant", "content": "", "tool_calls": calls}])
