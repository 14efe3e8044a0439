"""docs/sampling.md against the code, and against a reference that shares nothing with it."""

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from baton.engine.batch import SampleRequest
from baton.engine.sampler import Sampler
from baton.kernels import sampling
from baton.types import SamplingParams

DOC = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in DOC.splitlines() if "|" in line
]
NOISE = [row for row in ROWS if len(row) == 7 and row[3].startswith("0x")]
DRAWS = [row for row in ROWS if len(row) == 4 and row[0].isdigit()]


def murmur3(data: bytes, seed: int) -> int:
    """MurmurHash3_x86_32 of whole words, from its specification."""

    def rotl(x: int, r: int) -> int:
        return ((x << r) | (x >> (32 - r))) & 0xFFFFFFFF

    h = seed
    for (word,) in struct.iter_unpack("<I", data):
        k = rotl((word * 0xCC9E2D51) & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
        h = (rotl(h ^ k, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= len(data)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def reference_draw(logits: npt.NDArray[np.float64], params: SamplingParams, seed: int) -> int:
    """The pipeline after the penalties, in float64, by sorting everything."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    if params.temperature < 1e-5:
        return int(order[0])
    z = logits[order] / params.temperature
    keep = np.ones(len(z), bool)
    if params.top_k > 0:
        keep[params.top_k :] = False
    mass = np.where(keep, np.exp(z - z[0]), 0)
    if params.top_p < 1:
        keep &= np.cumsum(mass) - mass < params.top_p * mass.sum()
    if params.min_p > 0:
        keep &= z - z[0] >= math.log(params.min_p)
    kept = order[keep]
    hashes = [murmur3(struct.pack("<III", seed, 100, t), sampling.SAMPLING) for t in kept]
    u = ((np.array(hashes) >> 8) + 0.5) / 2**24
    scores = z[keep] - np.log(-np.log(u))
    return int(kept[scores.argmax()])


def test_murmur3_against_published_vectors() -> None:
    assert murmur3(b"", 1) == 0x514E28B7
    assert murmur3(b"test", 0) == 0xBA6BD213
    assert murmur3(b"test", 0x9747B28C) == 0x704B81DC
    assert murmur3(b"\xff\xff\xff\xff", 0) == 0x76293B50
    assert murmur3(b"\x21\x43\x65\x87", 0) == 0xF55B516B


def test_the_page_has_vectors() -> None:
    assert len(NOISE) >= 8
    assert len(DRAWS) >= 10


@pytest.mark.parametrize("row", NOISE, ids="-".join)
def test_noise(row: list[str]) -> None:
    seed, position, token, domain, value = (int(cell, 0) for cell in row[:5])
    noise = float.fromhex(row[6])
    assert murmur3(struct.pack("<III", seed, position, token), domain) == value
    key = torch.tensor(sampling.noise_key(seed, position, domain))
    hashes = sampling.token_hash(key, torch.tensor(token))
    assert int(hashes) == value
    assert int(row[5]) == value >> 8
    assert float(sampling.gumbel(hashes)) == noise
    assert noise == pytest.approx(-math.log(-math.log(((value >> 8) + 0.5) / 2**24)), rel=1e-7)


@pytest.mark.parametrize("row", DRAWS, ids="-".join)
def test_draws(row: list[str]) -> None:
    vocab_size = int(row[0])
    given: dict[str, Any] = {
        key: float(value) if "." in value else int(value)
        for key, value in re.findall(r"(\w+)=([\d.]+)", row[1])
    }
    params = SamplingParams(seed=42, logprobs=0, **given)
    seed = params.choice_seed(0)
    grid = (torch.arange(vocab_size) * 7919 % vocab_size).double() / vocab_size * 8 - 4
    prompt = tuple(range(300, 400))
    request = SampleRequest(0, seed, len(prompt), params, prompt, [])
    ((sampled,),) = Sampler([]).sample(grid.float()[None], [(request,)])
    assert str(sampled.token_id) == row[2]
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(float(row[3]), abs=2e-6)

    logits = grid.float().double().numpy()
    norm = math.log(np.exp(logits).sum())
    own = logits[sampled.token_id] - norm
    assert sampled.logprobs.logprob == pytest.approx(own, abs=1e-5)
    penalty, seen = params.repetition_penalty, list(prompt)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    assert reference_draw(logits, params, seed) == sampled.token_id


def test_seed_of_a_choice() -> None:
    import hashlib

    data = b"baton-seed-1" + struct.pack("<q", -5) + struct.pack("<I", 3)
    expected = struct.unpack("<I", hashlib.sha256(data).digest()[:4])[0]
    assert SamplingParams(seed=-5).choice_seed(3) == expected
