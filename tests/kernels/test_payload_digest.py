"""The digest of payloads on a device: by its definition, by torch, and by Triton (interpreted)."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from baton.kernels.payload_digest import payload_digests, payload_digests_torch
from baton.kernels.payload_digest_triton import payload_digests_triton

MASK = 2**64 - 1
VECTOR = 0x76F6A252C0FB2727  # of the bytes 0 to 63; a contract between versions


def defined(payload: bytes) -> int:
    """The formula, in Python's integers."""
    total = 0
    for index in range(len(payload) // 4):
        x = index << 32 | int.from_bytes(payload[4 * index : 4 * index + 4], "little")
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ x >> 33) * factor & MASK
        total += x ^ x >> 33
    return total & MASK


def tensor(payload: bytes) -> Tensor:
    return torch.tensor(list(payload), dtype=torch.uint8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=80).map(lambda b: b * 4), min_size=1, max_size=3))
def test_the_definition(payloads: list[bytes]) -> None:
    digests = payload_digests_torch([tensor(p) for p in payloads])
    assert [digest & MASK for digest in digests.tolist()] == [defined(p) for p in payloads]


def test_vector() -> None:
    assert defined(bytes(range(64))) == VECTOR
    assert payload_digests([tensor(bytes(range(64)))]).item() & MASK == VECTOR


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="compiled: see test_gpu")
@pytest.mark.parametrize("num_words", [0, 1, 4095, 4096, 9001])
def test_triton(num_words: int) -> None:
    payload = tensor(random.Random(num_words).randbytes(4 * num_words))
    other = tensor(b"\xff" * 4096)
    got = payload_digests_triton([payload, other])
    assert torch.equal(got, payload_digests_torch([payload, other]))


def test_no_bit_and_no_place_is_overlooked() -> None:
    payload = random.Random(0).randbytes(64)
    seen = {defined(payload)}
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(payload_digests([tensor(bytes(flipped))]).item() & MASK)
    for first in range(0, 64, 4):
        for second in range(first + 4, 64, 4):
            words = [payload[i : i + 4] for i in range(0, 64, 4)]
            words[first // 4], words[second // 4] = words[second // 4], words[first // 4]
            seen.add(payload_digests([tensor(b"".join(words))]).item() & MASK)
    assert len(seen) == 1 + 8 * 64 + 120


@pytest.mark.parametrize(
    "payload",
    [torch.zeros(6, dtype=torch.uint8), torch.zeros(4), torch.zeros(16, dtype=torch.uint8)[::2]],
    ids=["no whole word", "no bytes", "not contiguous"],
)
def test_what_is_no_payload_is_refused(payload: Tensor) -> None:
    with pytest.raises(ValueError, match="no payload"):
        payload_digests([payload])
