"""Chat messages to one prompt, with the model's own Jinja template.

Templates come with model weights and run in Jinja's immutable sandbox. The environment has what
Hugging Face templates are written against: block trimming, `raise_exception`, `strftime_now`, a
`tojson` that keeps HTML characters, loop controls, and the `generation` block.
"""

import datetime
import json
import time
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import InvalidRequest

Message = Mapping[str, Any]

# Stands where the prompt must end when the last message is to be continued. Private-use characters,
# so no message contains it by accident.
_CUT = "\ue000\ue001cut\ue001\ue000"
# What a template may make of one request; far more than a model can read.
MAX_PROMPT_CHARS = 2**26
MAX_RENDER_S = 10.0
_MAX_REPETITION = 2**20
_MAX_POWER = 64
_MAX_REASON_CHARS = 200
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; when serving
    it is its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Refusal(jinja2.TemplateError):
    """The template says that it cannot render these messages."""


def _raise(message: object = "") -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Arithmetic makes nothing large either: its operands may come with a request."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        sizes = [len(side) if isinstance(side, Sized) else abs(side) for side in (left, right)]
        is_repetition = any(isinstance(side, Sized) for side in (left, right))
        if (operator == "**" and max(sizes) > _MAX_POWER) or (
            is_repetition and sizes[0] * sizes[1] > _MAX_REPETITION
        ):
            raise SecurityError("too large")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """The templates of one model. Rendering is thread-safe."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`sources`: name → Jinja source; "default" is required, "tool_use" serves requests with
        tools. `special_tokens`: "bos_token", "eos_token", … as templates name them.

        Raises:
            ValueError: a template does not compile.
        """
        environment = _environment()
        try:
            self._templates = {
                name: environment.from_string(source) for name, source in sources.items()
            }
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens as text (so encode it without adding any).

        `continue_final_message` leaves the last message open for the model to go on with.
        `variables` are the request's chat_template_kwargs.

        Raises:
            InvalidRequest: param "messages": malformed, or refused by the template.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        chat = normalize_messages(messages)
        variables = variables or {}
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        context = {
            **self._special_tokens,
            **{k: v for k, v in variables.items() if k not in _RESERVED},
            "tools": list(tools) if tools else None,
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = self._run(name, chat, context)
        if not continue_final_message:
            return prompt
        chat[-1]["content"] += _CUT
        head, found, _ = self._run(name, chat, context).rpartition(_CUT)
        if not found:
            raise InvalidRequest(
                "the chat template drops the last message, so it cannot be continued", "messages"
            )
        # Where the template trims, the marker has kept a space that the closed form lacks.
        return head if prompt.startswith(head) else head.rstrip()

    def _run(self, name: str, chat: list[dict[str, Any]], context: dict[str, Any]) -> str:
        pieces: list[str] = []
        num_chars, until_s = 0, time.monotonic() + MAX_RENDER_S
        try:
            for piece in self._templates[name].generate({**context, "messages": chat}):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS or time.monotonic() > until_s:
                    raise SecurityError("too large")
            prompt = "".join(pieces)
            prompt.encode()  # arguments of tool calls may have had escaped surrogates
        except _Refusal as error:
            reason = str(error)[:_MAX_REASON_CHARS]
            raise InvalidRequest(f"the chat template refused: {reason}", "messages") from error
        except SecurityError as error:
            raise InvalidRequest("the messages make too large a prompt", "messages") from error
        except Exception as error:  # a template is a program; what it trips over is in the messages
            raise InvalidRequest(
                "the chat template cannot render these messages", "messages"
            ) from error
        return prompt


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies of `messages` in the form that templates expect: content as one string (text parts
    joined by newlines), arguments of tool calls parsed.

    Raises:
        InvalidRequest: param "messages".
    """
    if not messages:
        raise InvalidRequest("messages must not be empty", "messages")
    return [_normalize(index, message) for index, message in enumerate(messages)]


def message_text(message: Message) -> str:
    """The content of one message as templates see it.

    Raises:
        InvalidRequest: param "messages".
    """
    return str(normalize_messages([message])[0]["content"])


def _normalize(index: int, message: Message) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} needs a role", "messages")
    normal = dict(message)
    content = normal.get("content")
    if isinstance(content, list | tuple):
        normal["content"] = "\n".join(_text_part(where, part) for part in content)
    elif content is None:
        normal["content"] = ""
    elif not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be a string or a list of parts", "messages")
    if calls := normal.get("tool_calls"):
        if not isinstance(calls, list | tuple):
            raise InvalidRequest(f"{where}.tool_calls must be a list", "messages")
        normal["tool_calls"] = [_tool_call(where, call) for call in normal["tool_calls"]]
    return normal


def _text_part(where: str, part: Any) -> str:
    match part:
        case str():
            return part
        case {"type": "text", "text": str() as text}:
            return text
        case {"type": str()}:
            raise InvalidRequest(f"{where}: this model takes parts of type text only", "messages")
    raise InvalidRequest(f"{where}: a content part needs a type", "messages")


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    match call:
        case {"function": {"arguments": str() as arguments} as function}:
            try:
                parsed = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(
                    f"{where}.tool_calls: arguments are not JSON", "messages"
                ) from error
            return {**call, "function": {**function, "arguments": parsed}}
        case {"function": {}}:
            return dict(call)
    raise InvalidRequest(f"{where}.tool_calls: a call needs a function", "messages")
