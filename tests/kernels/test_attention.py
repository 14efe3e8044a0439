"""Attention over paged KV: the CPU path and the Triton kernels (interpreted) equal the reference,
and the reference equals plain attention."""

import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from baton.kernels.paged_attention import paged_decode_torch, paged_prefill_torch
from baton.kernels.paged_attention_cpu import CpuAttention, Invariance
from baton.kernels.paged_attention_native import NativeAttention, is_native
from baton.kernels.paged_decode_triton import paged_decode_triton
from baton.kernels.paged_prefill_triton import paged_prefill_triton
from baton.kernels.paged_rows import PagedRow

BLOCK_SIZE, NUM_BLOCKS = 16, 96
# (query heads, KV heads, head_dim): grouped, one each, odd group, not a power of two
HEADS = [(4, 2, 32), (2, 2, 16), (7, 1, 64), (6, 2, 24)]
WINDOWS = [0, 1, 20, 500]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make_cache(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    return torch.randn(shape, generator=generator).to(dtype)


def scattered(rows: Sequence[tuple[int, int]], seed: int = 0) -> list[PagedRow]:
    """(start, num_queries) of each row → rows with blocks of their own, in no order."""
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    made = []
    for start, num_queries in rows:
        num_blocks = -(-(start + num_queries) // BLOCK_SIZE)
        made.append(PagedRow(start, num_queries, order[:num_blocks]))
        del order[:num_blocks]
    return made


def in_a_run(rows: Sequence[tuple[int, int]]) -> list[PagedRow]:
    made, first = [], 3
    for start, num_queries in rows:
        num_blocks = -(-(start + num_queries) // BLOCK_SIZE)
        made.append(PagedRow(start, num_queries, range(first, first + num_blocks)))
        first += num_blocks
    return made


def tables(rows: Sequence[PagedRow]) -> tuple[Tensor, Tensor, Tensor]:
    """(query_starts, block_table, context_lens). What pads the table must never be read."""
    width = max(len(row.block_ids) for row in rows) + 1
    table = [[*row.block_ids, *[-(10**6)] * (width - len(row.block_ids))] for row in rows]
    starts = torch.tensor([0, *(row.num_queries for row in rows)]).cumsum(0)
    lens = torch.tensor([row.context_len for row in rows], dtype=torch.int32)
    return starts.int(), torch.tensor(table, dtype=torch.int32), lens


def reference(q: Tensor, cache: Tensor, rows: Sequence[PagedRow], window: int) -> Tensor:
    starts, table, lens = tables(rows)
    longest = max(row.num_queries for row in rows)
    return paged_prefill_torch(q, cache, starts, table, lens, longest, q.shape[2] ** -0.5, window)


def queries(rows: Sequence[PagedRow], heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Strided, as they come out of the fused projection."""
    num_tokens = sum(row.num_queries for row in rows)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_tokens, heads + 3, head_dim, generator=generator).to(dtype)[:, :heads]


@pytest.mark.parametrize("window", WINDOWS)
def test_reference_equals_plain_attention(window: int) -> None:
    (row,) = rows = scattered([(37, 21)])
    q, cache = queries(rows, 4, 32, torch.float32), make_cache(2, 32, torch.float32)
    keys, values = cache[:, row.block_ids].flatten(1, 2)[:, : row.context_len]
    keys, values = (t.repeat_interleave(2, dim=1).transpose(0, 1) for t in (keys, values))
    distance = torch.arange(37, 58)[:, None] - torch.arange(58)
    seen = (distance >= 0) & ((distance < window) if window else True)
    expected = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=seen)
    assert (reference(q, cache, rows, window) - expected.transpose(0, 1)).abs().max() < 1e-5


PREFILLS = [[(0, 1)], [(0, 64), (0, 3)], [(100, 65), (0, 130), (15, 1), (16, 17)], [(250, 200)]]
DECODES = [[(0, 1)], [(15, 1), (16, 1), (0, 1)], [(300, 1), (7, 1), (511, 1)], [(700, 1)]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("invariance", [None, Invariance()], ids=["plain", "invariant"])
def test_cpu_equals_the_reference(
    heads: tuple[int, int, int], window: int, dtype: torch.dtype, invariance: Invariance | None
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    cache = make_cache(num_kv_heads, head_dim, dtype)
    attention = CpuAttention(num_heads, num_kv_heads, head_dim, dtype, invariance)
    for shape in [*PREFILLS, *DECODES, [*DECODES[2], *PREFILLS[2]]]:
        for rows in (scattered(shape), in_a_run(shape)):
            q = queries(rows, num_heads, head_dim, dtype)
            got = attention.run(q, cache, attention.plan(rows, cache, window))
            error = (got.float() - reference(q.float(), cache.float(), rows, window)).abs().max()
            assert error < TOLERANCE[dtype], shape


needs_native = pytest.mark.skipif(
    not is_native(4, 2, 32, torch.float32),
    reason="paged_attention.c was not built, or is not for this machine",
)
# and one KV head for many, and heads of several widths
NATIVE_HEADS = [*HEADS, (64, 1, 8), (3, 3, 96), (2, 1, 256)]


@needs_native
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", NATIVE_HEADS)
def test_native_equals_the_reference(heads: tuple[int, int, int], window: int) -> None:
    num_heads, num_kv_heads, head_dim = heads
    cache = make_cache(num_kv_heads, head_dim, torch.float32)
    attention = NativeAttention(*heads)
    for shape in [*PREFILLS, *DECODES, [*DECODES[2], *PREFILLS[2]]]:
        for rows in (scattered(shape), in_a_run(shape)):
            q = queries(rows, num_heads, head_dim, torch.float32)
            got = attention.run(q, cache, attention.plan(rows, cache, window))
            error = (got - reference(q, cache, rows, window)).abs().max()
            assert error < TOLERANCE[torch.float32], shape


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 300),
    num_queries=st.integers(1, 150),
    cut=st.integers(0, 149),
    window=st.sampled_from([0, 1, 50, 64, 200]),
    block_size=st.sampled_from([16, 32, 48, 128]),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_native_bits_depend_on_the_sequence_alone(
    start: int,
    num_queries: int,
    cut: int,
    window: int,
    block_size: int,
    num_threads: int,
    seed: int,
) -> None:
    """Not on chunks, company, blocks, their size or the number of threads."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_dim = HEADS[seed % len(HEADS)]
    context_len, cut = start + num_queries, cut % num_queries
    attention = NativeAttention(num_heads, num_kv_heads, head_dim)
    kv = torch.randn(2, context_len, num_kv_heads, head_dim, generator=generator)
    q = torch.randn(num_queries, num_heads, head_dim, generator=generator)
    padding = (0, 0, 0, 0, 0, -context_len % 16)
    plain = F.pad(kv, padding).view(2, -1, 16, num_kv_heads, head_dim)
    row = PagedRow(start, num_queries, range(plain.shape[1]))
    whole = attention.run(q, plain, attention.plan([row], plain, window))

    num_blocks = -(-context_len // block_size)
    order = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks]
    shape = (2, num_blocks + 3, block_size, num_kv_heads, head_dim)
    cache = torch.randn(shape, generator=generator)
    padding = (0, 0, 0, 0, 0, -context_len % block_size)
    cache[:, order] = F.pad(kv, padding).view(2, -1, *shape[2:])
    blocks = order.tolist()
    parts = [(0, cut), (cut, num_queries - 1), (num_queries - 1, num_queries)]
    rows = [PagedRow(start + a, b - a, blocks) for a, b in parts if a < b]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        together = attention.run(q, cache, attention.plan(rows, cache, window))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, whole)
    alone = attention.run(q[-1:], cache, attention.plan(rows[-1:], cache, window))
    assert torch.equal(alone, whole[-1:])


@needs_native
def test_native_weights_of_any_size() -> None:
    """Scores so large that all but one weight vanish, and such that the highest comes last."""
    cache = make_cache(2, 32, torch.float32)
    attention, rows = NativeAttention(4, 2, 32), scattered([(150, 20), (200, 1)])
    for factor in (0.0, 1e-30, 30.0, 1e4):
        q = queries(rows, 4, 32, torch.float32) * factor
        got = attention.run(q, cache, attention.plan(rows, cache, 0))
        assert (got - reference(q, cache, rows, 0)).abs().max() < 1e-4 * max(1.0, factor / 100)


WRONG: dict[str, dict[str, object]] = {
    "a part of a query": {"q": np.zeros(4 * 32 - 1, np.float32)},
    "a small result": {"out": np.zeros((2, 4, 32), np.float32)},
    "half a block": {"kv": np.zeros(9 * 16 * 2 * 32, np.float32)},
    "a block past the pool": {"blocks": np.array([0, 5])},
    "a negative block": {"blocks": np.array([0, -1])},
    "too few blocks": {"blocks": np.array([0])},
    "a query too many": {"sequences": np.array([[17, 4, 0, 0]])},
    "a query before the first": {"sequences": np.array([[17, 3, -1, 0]])},
    "a negative position": {"sequences": np.array([[-1, 3, 0, 0]])},
    "blocks from behind": {"sequences": np.array([[17, 3, 0, 1]])},
    "no query": {"sequences": np.array([[17, 0, 0, 0]])},
    "a part of a sequence": {"sequences": np.array([17, 3, 0])},
    "heads that are not shared evenly": {"num_kv_heads": 3},
    "too many heads for one": {"num_heads": 130},
    "an odd width": {"head_dim": 12},
    "a negative window": {"window": -1},
    "no threads": {"num_threads": 0},
}


@needs_native
@pytest.mark.parametrize("changes", [{}, *WRONG.values()], ids=["nothing", *WRONG])
def test_native_refuses_what_does_not_fit(changes: dict[str, object]) -> None:
    from baton.kernels import _paged_attention

    arguments: dict[str, object] = {
        "q": np.zeros((3, 4, 32), np.float32),
        "kv": np.zeros((2, 5, 16, 2, 32), np.float32),
        "out": np.zeros((3, 4, 32), np.float32),
        "sequences": np.array([[17, 3, 0, 0]]),
        "blocks": np.array([0, 4]),
        "block_size": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "window": 0,
        "scale": 1.0,
        "num_threads": 1,
    }
    arguments |= changes
    if not changes:
        _paged_attention.attend_rows(*arguments.values())
        return
    with pytest.raises(ValueError, match="do not fit together"):
        _paged_attention.attend_rows(*arguments.values())


# Triton's interpreter multiplies the bit patterns of bfloat16; bench/gpu.py checks it on a GPU.
INTERPRETED = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("heads", HEADS)
def test_triton_decode_equals_the_reference(
    heads: tuple[int, int, int], window: int, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    cache = make_cache(num_kv_heads, head_dim, dtype)
    for shape in DECODES:
        rows = scattered(shape)
        q = queries(rows, num_heads, head_dim, dtype)
        _, table, lens = tables(rows)
        got = paged_decode_triton(q, cache, table, lens, head_dim**-0.5, window)
        expected = paged_decode_torch(q, cache, table, lens, head_dim**-0.5, window)
        assert (got.float() - expected.float()).abs().max() < TOLERANCE[dtype], shape


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("heads", HEADS[:2])
def test_triton_prefill_equals_the_reference(
    heads: tuple[int, int, int], window: int, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    cache = make_cache(num_kv_heads, head_dim, dtype)
    for shape in PREFILLS[:3]:
        rows = scattered(shape)
        q = queries(rows, num_heads, head_dim, dtype)
        starts, table, lens = tables(rows)
        longest = max(row.num_queries for row in rows)
        scale = head_dim**-0.5
        got = paged_prefill_triton(q, cache, starts, table, lens, longest, scale, window)
        expected = paged_prefill_torch(q, cache, starts, table, lens, longest, scale, window)
        assert (got.float() - expected.float()).abs().max() < TOLERANCE[dtype], shape


@pytest.mark.parametrize("head_dim", [96, 160])
def test_triton_kernels_take_wide_heads(head_dim: int) -> None:
    """Tiles depend on the width; here more than 64, and more than 128."""
    cache, scale = make_cache(1, head_dim, torch.float32), head_dim**-0.5
    rows = scattered([(20, 40)])
    q = queries(rows, 2, head_dim, torch.float32)
    starts, table, lens = tables(rows)
    got = paged_prefill_triton(q, cache, starts, table, lens, 40, scale)
    expected = paged_prefill_torch(q, cache, starts, table, lens, 40, scale)
    assert (got - expected).abs().max() < TOLERANCE[torch.float32]
    got = paged_decode_triton(q[-1:], cache, table, lens, scale)
    assert (got - expected[-1:]).abs().max() < TOLERANCE[torch.float32]
