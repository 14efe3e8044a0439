"""What may come in over a wire: sizes and checks that every `*_from_pb` uses."""

import math
from collections.abc import Sized

from baton.errors import BatonError, Cause

MAX_TOKENS = 1 << 22  # token ids in one field
MAX_ID_LEN = 256  # request and worker ids
MAX_ADDRESS_LEN = 512
MAX_DETAIL_LEN = 1024
MAX_SALT_BYTES = 64 << 10
MAX_TRACEPARENT_LEN = 64
MAX_ITEMS = 64  # KV groups, transports, capabilities, EOS ids
DIGEST_BYTES = 32
RANDOM_ID_BYTES = 16  # incarnations, transfer ids


def refuse(what: str) -> BatonError:
    return BatonError(Cause.PROTOCOL, f"malformed message: {what}")


def check_len(value: Sized, limit: int, what: str) -> None:
    if len(value) > limit:
        raise refuse(f"{what} is longer than {limit}")


def exactly(value: bytes, length: int, what: str) -> bytes:
    if len(value) != length:
        raise refuse(f"{what} has {len(value)} bytes instead of {length}")
    return value


def text(value: str, limit: int, what: str) -> str:
    if not 0 < len(value) <= limit:
        raise refuse(f"{what} has {len(value)} characters, allowed are 1 to {limit}")
    return value


def finite(value: float, what: str) -> float:
    if not math.isfinite(value) or value < 0:
        raise refuse(f"{what} is {value}")
    return value


def cause_from_pb(number: int) -> Cause:
    try:
        return Cause(number)
    except ValueError:
        raise refuse(f"cause {number}") from None
