"""Reads {"name": …, "arguments": {…}} as it comes, and hands the arguments on unchanged."""

import json
from enum import Enum, auto

from baton.gateway.parsers.pieces import Arguments, CallStart, Piece

_ARGUMENTS = frozenset({"arguments", "parameters"})
_OPEN, _CLOSE = "{[", "}]"


class _At(Enum):
    START = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()
    DONE = auto()
    BROKEN = auto()


class CallScanner:
    """One call. Nothing is handed on before its name is known; `raw` is all that was read."""

    def __init__(self) -> None:
        self.raw = ""
        self.is_started = False
        self._at = _At.START
        self._key = ""
        self._token = ""  # the key or value that is being read
        self._depth = 0  # of brackets inside it
        self._in_string = False
        self._escaped = False
        self._early = ""  # arguments that came before the name
        self._has_arguments = False

    @property
    def is_done(self) -> bool:
        return self._at is _At.DONE

    @property
    def is_broken(self) -> bool:
        """This is no call: not JSON, or without a name."""
        return self._at is _At.BROKEN

    @property
    def is_between_members(self) -> bool:
        """A member of the object has just ended."""
        return self._at is _At.COMMA

    def push(self, text: str) -> tuple[list[Piece], str]:
        """(pieces, what follows the call). Whoever sees `is_broken` takes `raw` for plain text,
        unless the call `is_started`."""
        pieces: list[Piece] = []
        for position, char in enumerate(text):
            if self._at in (_At.DONE, _At.BROKEN):
                return _merged(pieces), text[position:]
            self.raw += char
            pieces += self._read(char)
        return _merged(pieces), ""

    def _read(self, char: str) -> list[Piece]:
        if self._at is _At.VALUE:
            return self._read_value(char)
        if self._at is _At.KEY and (self._token or char == '"'):
            self._read_key(char)
        elif char.isspace():
            pass
        elif self._at is _At.START and char == "{":
            self._at = _At.KEY
        elif self._at is _At.COLON and char == ":":
            self._at = _At.VALUE
        elif self._at is _At.COMMA and char == ",":
            self._at = _At.KEY
        elif self._at in (_At.COMMA, _At.KEY) and char == "}":
            return self._close()
        else:
            self._at = _At.BROKEN
        return []

    def _read_key(self, char: str) -> None:
        self._token += char
        if len(self._token) > 1 and self._ends_string(char):
            self._key, self._token = self._decoded(), ""
            if self._at is not _At.BROKEN:
                self._at = _At.COLON

    def _ends_string(self, char: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            return True
        return False

    def _read_value(self, char: str) -> list[Piece]:
        if not self._token and char.isspace():
            return []
        is_bare = bool(self._token) and not self._in_string and self._depth == 0
        if is_bare and (char in ",}" or char.isspace()):  # a number or a literal is over
            return [*self._end_value(), *self._read(char)]
        self._token += char
        is_over = False
        if self._in_string:
            if self._ends_string(char):
                self._in_string = False
                is_over = self._depth == 0
        elif char == '"':
            self._in_string = True
        elif char in _OPEN:
            self._depth += 1
        elif char in _CLOSE:
            self._depth -= 1
            is_over = self._depth <= 0
        streams = self._key in _ARGUMENTS and self._token[0] in _OPEN
        pieces = self._hand_on(char) if streams else []
        return [*pieces, *self._end_value()] if is_over else pieces

    def _end_value(self) -> list[Piece]:
        token, self._token, self._at = self._token, "", _At.COMMA
        if self._key == "name" and not self.is_started:
            self._token = token
            name, self._token = self._decoded(), ""
            if not name:
                self._at = _At.BROKEN
            if self._at is _At.BROKEN:
                return []
            self.is_started = True
            early, self._early = self._early, ""
            return [CallStart(name), *([Arguments(early)] if early else [])]
        if self._key in _ARGUMENTS and token[0] == '"':  # JSON inside a string
            self._token = token
            inner, self._token = self._decoded(), ""
            return self._hand_on(inner) if self._at is not _At.BROKEN else []
        return []

    def _decoded(self) -> str:
        try:
            value = json.loads(self._token)
        except ValueError:
            value = None
        if isinstance(value, str):
            return value
        self._at = _At.BROKEN
        return ""

    def _hand_on(self, text: str) -> list[Piece]:
        self._has_arguments = True
        if self.is_started:
            return [Arguments(text)]
        self._early += text
        return []

    def _close(self) -> list[Piece]:
        if not self.is_started:
            self._at = _At.BROKEN
            return []
        self._at = _At.DONE
        return [] if self._has_arguments else [Arguments("{}")]


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Arguments that follow each other as one."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, Arguments) and isinstance(last, Arguments):
            merged[-1] = Arguments(last.text + piece.text)
        else:
            merged.append(piece)
    return merged
