"""How models write calls of tools, by the names that vLLM gives the formats:
`--tool-call-parser`.

    hermes, qwen3   text <tool_call>{"name": …, "arguments": {…}}</tool_call> …
    llama3_json     {"name": …, "parameters": {…}}; {…}          the whole answer
    mistral         text [TOOL_CALLS][{"name": …, "arguments": {…}}, …] or [TOOL_CALLS]name{…}
    pythonic        [name(key="value", …), …]                    the whole answer

What turns out to be no call is content, to the last character.
"""

import ast
import json
from collections.abc import Callable, Mapping

from baton.gateway.parsers.json_calls import CallScanner
from baton.gateway.parsers.pieces import (
    Arguments,
    CallStart,
    Content,
    Parser,
    Piece,
    content,
    held_back,
)


class TaggedCalls:
    """One JSON call between each pair of tags, content around them."""

    def __init__(self, start: str = "<tool_call>", end: str = "</tool_call>") -> None:
        self._start, self._end = start, end
        self._held = ""
        self._call: CallScanner | None = None
        self._has_calls = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._held:
            held = self._held
            pieces += self._read_text() if self._call is None else self._read_call(self._call)
            if self._held == held:
                break
        return pieces

    def _read_text(self) -> list[Piece]:
        before, start, rest = self._held.partition(self._start)
        if start:
            self._held, self._call = rest, CallScanner()
            return self._content(before)
        keep = held_back(self._held, self._start)
        free, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return self._content(free)

    def _content(self, text: str) -> list[Piece]:
        """Blank lines between calls are of no interest."""
        return [] if self._has_calls and text.isspace() else content(text)

    def _read_call(self, call: CallScanner) -> list[Piece]:
        if not (call.is_done or call.is_broken):
            pieces, self._held = call.push(self._held)
            self._has_calls |= call.is_started
            return pieces
        if call.is_broken and not call.is_started:
            self._call = None
            return [Content(self._start + call.raw)]
        _, end, rest = self._held.partition(self._end)
        if end:
            self._held, self._call = rest, None
        else:
            self._held = self._held[len(self._held) - held_back(self._held, self._end) :]
        return []

    def finish(self) -> list[Piece]:
        call, held = self._call, self._held
        self._held, self._call = "", None
        if call is None:
            return self._content(held)
        return [] if call.is_started else content(self._start + call.raw + held)


class CallList:
    """Nothing but calls, separated by whatever JSON does not begin with; else all content.

    `opening` may stand in front of the first; `brackets` allows a list around them.
    """

    def __init__(self, opening: str = "", *, brackets: bool = False) -> None:
        self._opening = opening
        self._between = " \t\r\n;," + ("[]" if brackets else "")
        self._raw = ""  # of what may still be content
        self._call: CallScanner | None = None
        self._is_content = False
        self._has_calls = False

    def push(self, text: str) -> list[Piece]:
        if self._is_content:
            return content(text)
        pieces: list[Piece] = []
        while text and not self._is_content:
            if self._call is None:
                text = self._skip(text)
                continue
            found, text = self._call.push(text)
            pieces += found
            if self._call.is_started:
                self._has_calls, self._raw = True, ""
            if self._call.is_done or (self._call.is_broken and self._has_calls):
                self._call = None
            elif self._call.is_broken:
                text = self._call.raw + text
                self._is_content = True
        return [*pieces, *self._rest(text)]

    def _skip(self, text: str) -> str:
        """Up to the next call; `_is_content` if there is none."""
        self._raw += text
        begun = self._raw.lstrip(self._between)
        if self._opening and not self._has_calls:
            begun = begun.removeprefix(self._opening).lstrip(self._between)
            if begun != self._opening and self._opening.startswith(begun):
                return ""
        if begun.startswith("{"):
            self._raw = self._raw[: len(self._raw) - len(begun)]
            self._call = CallScanner()
            return begun
        if begun and self._has_calls:
            self._raw = ""
            return ""  # chatter behind the calls
        if begun:
            self._raw = self._raw[: len(self._raw) - len(begun)]
            self._is_content = True
            return begun
        return ""

    def _rest(self, text: str) -> list[Piece]:
        if not self._is_content:
            return []
        raw, self._raw = self._raw, ""
        return content(raw + text)

    def finish(self) -> list[Piece]:
        if self._is_content or self._has_calls:
            return []
        return content(self._raw + (self._call.raw if self._call else ""))


class MistralCalls:
    """Content, then [TOOL_CALLS] and a JSON list, or a name and its arguments each."""

    TAG = "[TOOL_CALLS]"

    def __init__(self) -> None:
        self._held = ""
        self._calls: CallList | _NamedCalls | None = None
        self._is_tagged = False

    def push(self, text: str) -> list[Piece]:
        if self._calls is not None:
            return self._calls.push(text)
        self._held += text
        if not self._is_tagged:
            before, tag, rest = self._held.partition(self.TAG)
            if not tag:
                keep = held_back(self._held, self.TAG)
                free = self._held[: len(self._held) - keep]
                self._held = self._held[len(free) :]
                return content(free)
            self._is_tagged, self._held = True, rest
            return [*content(before), *self.push("")]
        begun = self._held.lstrip()
        if not begun:
            return []
        self._calls = CallList(brackets=True) if begun[0] in "[{" else _NamedCalls()
        return self._calls.push(begun)

    def finish(self) -> list[Piece]:
        if self._calls is not None:
            return self._calls.finish()
        return content(self._held) if not self._is_tagged else content(self.TAG + self._held)


class _NamedCalls:
    """name{…}[TOOL_CALLS]name{…} …"""

    def __init__(self) -> None:
        self._name = ""
        self._call: CallScanner | None = None

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        for char in text:
            if self._call is None and char == "{":
                name = self._name.replace(MistralCalls.TAG, "").replace("[ARGS]", "").strip()
                self._call = CallScanner()
                found, _ = self._call.push(f'{{"name":{json.dumps(name)},"arguments":{{')
                pieces += found
            elif self._call is None:
                self._name += char
            else:
                found, _ = self._call.push(char)
                pieces += found
                self._end_call()
        return pieces

    def _end_call(self) -> None:
        """The arguments are complete once one more bracket would complete the call."""
        assert self._call is not None
        if self._call.is_between_members:
            self._call, self._name = None, ""

    def finish(self) -> list[Piece]:
        return content(self._name) if self._call is None else []


class PythonicCalls:
    """Python calls in a list. They are known to be calls only when the list is closed."""

    def __init__(self) -> None:
        self._held = ""
        self._is_content = False

    def push(self, text: str) -> list[Piece]:
        if self._is_content:
            return content(text)
        self._held += text
        begun = self._held.lstrip()
        if begun and begun[0] != "[":
            self._is_content, held, self._held = True, self._held, ""
            return content(held)
        return []

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        return _python_calls(held) or content(held)


def _python_calls(text: str) -> list[Piece]:
    """Empty if it is anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        pieces: list[Piece] = []
        for call in tree.elts:
            if not isinstance(call, ast.Call) or call.args:
                return []
            arguments = {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
            pieces += [CallStart(ast.unparse(call.func)), Arguments(json.dumps(arguments))]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return []
    return pieces


class RequiredCalls(CallList):
    """What the grammar of `tool_choice: required` allows: a JSON list of calls."""

    def __init__(self) -> None:
        super().__init__(brackets=True)


class NamedCall:
    """What the grammar of a named tool allows: its arguments, and nothing else."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> list[Piece]:
        if not text:
            return []
        name, self._name = self._name, None
        arguments = Arguments(text)
        return [arguments] if name is None else [CallStart(name), arguments]

    def finish(self) -> list[Piece]:
        return []


TOOL_PARSERS: Mapping[str, Callable[[], Parser]] = {
    "hermes": TaggedCalls,
    "qwen3": TaggedCalls,
    "llama3_json": lambda: CallList("<|python_tag|>"),
    "mistral": MistralCalls,
    "pythonic": PythonicCalls,
}
