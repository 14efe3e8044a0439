"""JSON, read strictly: what Python's parser tolerates but JSON does not mean is refused.

That parser runs C code that gives way to nobody within one list or object, so what would take it
long is found out before, in small pieces.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np

from baton.errors import InvalidRequest

MAX_BYTES_AT_ONCE = 256 * 2**10  # of JSON that is parsed without letting anybody else run
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BETWEEN_BRACKETS = 92  # "[" is one less, "]" one more
_ESCAPE_BYTES = 6
_LONE_SURROGATE = re.compile(  # it begins with what is searched for quickly
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F](?<!\\u[dD][89abAB]..\\u[dD].))", re.DOTALL
)


def parse_json(body: bytes, max_depth: int, max_keys: int, max_values: int) -> Any:
    """UTF-8, no NaN or Infinity, no duplicate keys, no lone surrogates, no number that is out of
    Python's range, nothing nested deeper than `max_depth`; at most `max_keys` keys and `max_values`
    values in all objects and lists together.

    Raises:
        InvalidRequest
    """
    _check_structure(body, max_depth, max_keys, max_values)
    try:
        text = body.decode()
        value = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_float,
            object_pairs_hook=_unique,
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not JSON: {error.msg} at {error.pos}.") from None
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not UTF-8.") from None
    except ValueError:
        raise InvalidRequest("The body has a number with too many digits.") from None
    if b"\\u" in body and _has_lone_surrogate(body.replace(b"\\\\", b"__")):
        raise InvalidRequest("The body has a lone surrogate in a string.")
    return value


def _check_structure(body: bytes, max_depth: int, max_keys: int, max_values: int) -> None:
    """Before parsing, since the parser recurses."""
    num_open = body.count(b"[") + body.count(b"{")
    num_values = num_open + body.count(b",")
    if num_open <= max_depth and num_values <= max_values and body.count(b":") <= max_keys:
        return
    depth = num_keys = num_values = 0
    for outside in _outside_strings(body):
        brackets = outside.translate(_ONE_KIND, _NOT_BRACKETS)
        num_keys += outside.count(b":")
        num_values += outside.count(b",") + brackets.count(b"[")
        if num_keys > max_keys:
            raise InvalidRequest(f"The body has more than {max_keys} keys.")
        if num_values > max_values:
            raise InvalidRequest(f"The body has more than {max_values} values.")
        steps = _BETWEEN_BRACKETS - np.frombuffer(brackets, np.uint8).astype(np.int32)
        levels = depth + np.cumsum(steps)
        if levels.size:
            depth = int(levels[-1])
            if levels.max() > max_depth:
                raise InvalidRequest(f"The body is nested deeper than {max_depth} levels.")


def _has_lone_surrogate(body: bytes) -> bool:
    """`body` has no escaped backslashes. Looked at piece by piece, each with the escape behind it:
    what is found there belongs to the next one."""
    for start in range(0, len(body), MAX_BYTES_AT_ONCE):
        stop = start + MAX_BYTES_AT_ONCE
        found = _LONE_SURROGATE.search(body, start, stop + 2 * _ESCAPE_BYTES)
        if found is not None and found.start() < stop:
            return True
    return False


def _outside_strings(body: bytes) -> Iterator[bytes]:
    """What is no string, piece by piece."""
    inside, held = False, b""  # of a string; what an escape may still need
    for start in range(0, len(body), MAX_BYTES_AT_ONCE):
        piece = held + body[start : start + MAX_BYTES_AT_ONCE]
        cut = len(piece) - (len(piece) - len(piece.rstrip(b"\\"))) % 2
        piece, held = piece[:cut], piece[cut:]
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= len(parts) % 2 == 0


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not JSON: {name} is not a JSON number.")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise InvalidRequest("The body has a number that is too large.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidRequest("The body has an object with the same key twice.")
    return value
