"""pack/unpack: both CPU paths, the torch reference and the Triton kernel (interpreted) agree."""

import os
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from baton.kernels import kv_pack
from baton.types import KVRange

try:
    from baton.kernels import _kv_copy as native
except ImportError:
    native = None

NUM_LAYERS, NUM_BLOCKS, NUM_HEADS, HEAD_DIM = 3, 12, 4, 6


def make_cache(block_size: int, dtype: torch.dtype = torch.bfloat16, fill: int = 0) -> Tensor:
    shape = (NUM_LAYERS, 2, NUM_BLOCKS, block_size, NUM_HEADS, HEAD_DIM)
    generator = torch.Generator().manual_seed(fill)
    return torch.randn(shape, generator=generator).to(dtype)


def expected_payload(cache: Tensor, block_ids: list[int], where: KVRange) -> bytes:
    """The wire order, spelled out."""
    block_size = cache.shape[3]
    heads = range(where.head_start, where.head_stop) if where.head_stop else range(NUM_HEADS)
    rows = [
        cache[layer, kv, block_ids[token // block_size], token % block_size, head]
        for layer in range(where.layer_start, where.layer_stop)
        for token in range(where.token_start, where.token_stop)
        for kv in (0, 1)
        for head in heads
    ]
    return bytes(torch.stack(rows).view(torch.uint8).numpy().tobytes())


def copy_triton(cache: Tensor, block_ids: list[int], where: KVRange, wire: Tensor, pack: bool):
    from baton.kernels.kv_pack_triton import copy_kv_triton

    copy_kv_triton(cache, block_ids, where, wire, pack=pack)


IMPLEMENTATIONS = {
    "cpu": (kv_pack.pack_kv, kv_pack.unpack_kv),
    "numpy": (partial(kv_pack.copy_numpy, pack=True), partial(kv_pack.copy_numpy, pack=False)),
    "torch": (kv_pack.pack_kv_torch, kv_pack.unpack_kv_torch),
    "triton": (
        lambda *args: copy_triton(*args, pack=True),
        lambda *args: copy_triton(*args, pack=False),
    ),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "where",
    [
        KVRange(0, 3, 0, 20),
        KVRange(1, 2, 3, 4),
        KVRange(0, 2, 5, 18, 1, 3),
        KVRange(2, 3, 16, 20, 3, 4),
    ],
)
def test_wire_order(name: str, dtype: torch.dtype, where: KVRange) -> None:
    pack, unpack = IMPLEMENTATIONS[name]
    source, block_ids = make_cache(4, dtype, fill=1), [7, 8, 2, 0, 11]
    wire = torch.empty(kv_pack.payload_bytes(source, where), dtype=torch.uint8)
    pack(source, block_ids, where, wire)
    assert wire.numpy().tobytes() == expected_payload(source, block_ids, where)

    target, other_ids = make_cache(16, dtype, fill=2), [5, 3]
    untouched = target.clone()
    unpack(target, other_ids, where, wire)
    assert expected_payload(target, other_ids, where) == wire.numpy().tobytes()
    kv_pack.unpack_kv_torch(target, other_ids, where, _pack(untouched, other_ids, where))
    assert torch.equal(target, untouched)  # nothing outside the range was written


def _pack(cache: Tensor, block_ids: list[int], where: KVRange) -> Tensor:
    wire = torch.empty(kv_pack.payload_bytes(cache, where), dtype=torch.uint8)
    kv_pack.pack_kv_torch(cache, block_ids, where, wire)
    return wire


@st.composite
def ranges(draw: st.DrawFn, num_tokens: int) -> KVRange:
    def interval(stop: int) -> tuple[int, int]:
        start = draw(st.integers(0, stop - 1))
        return start, draw(st.integers(start + 1, stop))

    heads = draw(st.booleans())
    return KVRange(
        *interval(NUM_LAYERS), *interval(num_tokens), *(interval(NUM_HEADS) if heads else (0, 0))
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_block_sizes_and_ranges_convert(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, 24))
    where = data.draw(ranges(num_tokens))
    caches = []
    for fill in (1, 2):
        block_size = data.draw(st.sampled_from([2, 4, 16]))
        rng = random.Random(data.draw(st.integers(0, 99)))
        num_blocks = -(-num_tokens // block_size)
        caches.append(
            (make_cache(block_size, fill=fill), rng.sample(range(NUM_BLOCKS), num_blocks))
        )
    (source, source_ids), (target, target_ids) = caches
    wire = torch.empty(kv_pack.payload_bytes(source, where), dtype=torch.uint8)
    kv_pack.pack_kv(source, source_ids, where, wire)
    assert torch.equal(wire, _pack(source, source_ids, where))
    kv_pack.unpack_kv(target, target_ids, where, wire)
    assert torch.equal(_pack(target, target_ids, where), wire)


@pytest.mark.parametrize(
    ("where", "block_ids"),
    [
        (KVRange(0, 4, 0, 4), [0]),
        (KVRange(2, 2, 0, 4), [0]),
        (KVRange(0, 1, 0, 5), [0]),
        (KVRange(0, 1, 0, 4, 2, 5), [0]),
        (KVRange(0, 1, 0, 4), [NUM_BLOCKS]),
        (KVRange(0, 1, 0, 4), [-1]),
    ],
)
def test_what_does_not_fit_the_cache_is_refused(where: KVRange, block_ids: list[int]) -> None:
    cache = make_cache(4)
    wire = torch.empty(max(kv_pack.payload_bytes(cache, where), 0), dtype=torch.uint8)
    for pack in (kv_pack.pack_kv, kv_pack.unpack_kv, kv_pack.pack_kv_torch):
        with pytest.raises(ValueError, match="not in"):
            pack(cache, block_ids, where, wire)


def test_a_payload_of_the_wrong_size_is_refused() -> None:
    cache, where = make_cache(4), KVRange(0, 1, 0, 4)
    wire = torch.empty(kv_pack.payload_bytes(cache, where) + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bytes for"):
        kv_pack.unpack_kv(cache, [0], where, wire)


def test_on_cpu_plain_buffers_will_do() -> None:
    source, target, where = make_cache(4, fill=1), make_cache(4, fill=2), KVRange(0, 3, 1, 7)
    out = bytearray(kv_pack.payload_bytes(source, where))
    kv_pack.pack_kv(source, [3, 4], where, out)
    kv_pack.unpack_kv(target, [1, 9], where, bytes(out))
    assert expected_payload(target, [1, 9], where) == expected_payload(source, [3, 4], where)


def test_adjacent_blocks_become_one_run() -> None:
    assert list(kv_pack.slot_runs([4, 5, 6, 1, 2], 4, 2, 19)) == [(2, 18, 10), (12, 4, 7)]


# A pool of 2 layers, 8 slots of 48 bytes; 2 tokens of layer 1, bytes 16..48 of each.
FITS = {"runs": [(6, 0, 2)], "layers": (2, 1, 1), "item": (48, 16, 32), "num_bytes": 2 * 2 * 32}
MISFITS = [
    {"runs": [(7, 0, 2)]},
    {"runs": [(-1, 0, 2)]},
    {"runs": [(6, 1, 2)]},
    {"runs": [(6, -1, 2)]},
    {"runs": [(6, 0, 0)]},
    {"runs": [(6, 0, 2**62)]},
    {"runs": [(2**62, 0, 2)]},
    {"layers": (2, 2, 1)},
    {"layers": (2, 1, 2**62)},
    {"layers": (0, 0, 0)},
    {"layers": (5, 1, 1)},
    {"item": (48, 17, 32)},
    {"item": (48, -1, 32)},
    {"item": (40, 0, 32)},
    {"item": (2**62, 0, 32)},
    {"num_bytes": 2 * 2 * 32 + 1},
    {"num_bytes": 0},
]


needs_native = pytest.mark.skipif(native is None, reason="kv_copy.c was not built")


def copy_runs(pool, wire, fits: dict[str, Any], to_wire: bool) -> None:
    runs = np.array(fits["runs"], np.int64)
    native.copy_runs(pool, wire, runs, *fits["layers"], *fits["item"], to_wire)


@needs_native
@pytest.mark.parametrize("wrong", MISFITS, ids=str)
@pytest.mark.parametrize("to_wire", [True, False])
def test_copy_runs_refuses_what_does_not_fit(wrong: dict[str, Any], to_wire: bool) -> None:
    fits = {**FITS, **wrong}
    pool, wire = bytearray(2 * 2 * 8 * 48), bytearray(fits["num_bytes"])
    (pool if to_wire else wire)[:] = b"\1" * len(pool if to_wire else wire)
    with pytest.raises(ValueError, match="do not fit"):
        copy_runs(pool, wire, fits, to_wire)
    assert not any(wire if to_wire else pool)


@needs_native
def test_copy_runs_writes_into_nothing_that_is_read_only() -> None:
    pool, wire = bytearray(2 * 2 * 8 * 48), bytearray(b"\1" * FITS["num_bytes"])
    copy_runs(pool, bytes(wire), FITS, to_wire=False)
    assert sum(pool) == len(wire)
    for arguments in ((bytes(pool), wire, False), (pool, bytes(wire), True)):
        with pytest.raises(ValueError, match="do not fit"):
            copy_runs(*arguments[:2], FITS, to_wire=arguments[2])
