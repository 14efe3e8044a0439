"""The Triton kernels on a CUDA device against the torch references: `pytest -m gpu`, with
TRITON_INTERPRET=0. Shapes that divide by nothing, every dtype; bench.gpu has the large ones."""

import random

import pytest
import torch
from torch import Tensor

from baton.kernels.kv_pack import pack_kv, pack_kv_torch, payload_bytes, unpack_kv, unpack_kv_torch
from baton.kernels.kv_store import kv_store, kv_store_torch
from baton.kernels.logprobs import Wanted, token_logprobs
from baton.kernels.paged_attention import paged_decode, paged_prefill
from baton.kernels.rms_norm import rms_norm, rms_norm_torch
from baton.kernels.rope import rope, rope_torch
from baton.kernels.sampling import Draw, draw_tokens, gumbel_argmax, gumbel_argmax_torch, noise_key
from baton.kernels.silu_mul import silu_mul, silu_mul_torch
from baton.types import KVRange
from tests.kernels.test_attention import make_cache, queries, reference, scattered, tables
from tests.kernels.test_sampling import random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# (query heads, KV heads, head_dim), up to the widest
HEADS = [(4, 2, 32), (2, 2, 16), (7, 1, 64), (6, 2, 24), (3, 1, 96), (8, 2, 128), (2, 1, 256)]
PREFILLS = [[(0, 1)], [(0, 64), (0, 3)], [(100, 65), (0, 130), (15, 1), (16, 17)], [(250, 200)]]
DECODES = [[(0, 1)], [(15, 1), (16, 1), (0, 1)], [(300, 1), (7, 1), (511, 1)], [(1400, 1)]]


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [0, 20])
def test_attention(heads: tuple[int, int, int], window: int, dtype: torch.dtype) -> None:
    """What pads a block table would be an illegal access, and unused slots hold NaN."""
    num_heads, num_kv_heads, head_dim = heads
    scale = head_dim**-0.5
    for is_decode, shape in [(False, s) for s in PREFILLS] + [(True, s) for s in DECODES]:
        rows, cache = scattered(shape), make_cache(num_kv_heads, head_dim, dtype)
        q = queries(rows, num_heads, head_dim, dtype)
        expected = reference(q.float(), cache.float(), rows, window)
        starts, table, lens = (t.cuda() for t in tables(rows))
        there = poison_unused(cache.cuda(), table, lens)
        if is_decode:
            got = paged_decode(q.cuda(), there, table, lens, scale, window)
        else:
            longest = max(row.num_queries for row in rows)
            got = paged_prefill(q.cuda(), there, starts, table, lens, longest, scale, window)
        error = (got.cpu().float() - expected).abs().max()
        assert error < TOLERANCE[dtype], shape


def poison_unused(cache: Tensor, table: Tensor, lens: Tensor) -> Tensor:
    """The same cache, with NaN in slots that no row has."""
    _, num_blocks, block_size, _, _ = cache.shape
    used = torch.zeros(num_blocks * block_size, dtype=torch.bool, device=cache.device)
    for line, length in zip(table, lens.tolist(), strict=True):
        at = torch.arange(length, device=cache.device)
        used[line[at // block_size] * block_size + at % block_size] = True
    cache.flatten(1, 2)[:, ~used] = float("nan")
    return cache


def test_a_row_without_context_is_zero() -> None:
    """As the empty rows of a decode graph are."""
    cache = torch.full((2, 4, 16, 2, 64), float("nan"), device="cuda")
    table, lens = (torch.zeros(3, n, dtype=torch.int32, device="cuda") for n in (9, 1))
    q = torch.randn(3, 4, 64, device="cuda")
    assert not paged_decode(q, cache, table, lens[:, 0], 0.1).any()


@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 16), (2, 7, 80), (33, 4096), (2, 3, 8192)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (torch.randn(s, device="cuda").to(dtype) for s in (shape, shape[-1:]))
    error = (rms_norm(x, weight, 1e-5).float() - rms_norm_torch(x, weight, 1e-5).float()).abs()
    assert error.max() < TOLERANCE[dtype] * 2


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 48), (40, 128), (9, 256)])
def test_rope(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, heads + 2, head_dim, device="cuda").to(dtype)[:, :heads]
    cos_sin = torch.rand(4, 2, head_dim, device="cuda")
    cos_sin[:, 0, head_dim // 2 :] = cos_sin[:, 0, : head_dim // 2]
    cos_sin[:, 1, : head_dim // 2] = -cos_sin[:, 1, head_dim // 2 :]
    error = (rope(x, cos_sin).float() - rope_torch(x, cos_sin).float()).abs()
    assert error.max() < TOLERANCE[dtype]


@pytest.mark.parametrize("size", [16, 1024, 1500])
def test_silu_mul(size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2 * size, device="cuda") * 3).to(dtype)
    expected = silu_mul_torch(x.double())
    error = (silu_mul(x).double() - expected).abs()
    assert (error <= TOLERANCE[dtype] * expected.abs().clamp(min=1)).all()


def test_kv_store(dtype: torch.dtype) -> None:
    wide = torch.randn(6, 9, 24, device="cuda").to(dtype)
    k, v = wide[:, 2:5], wide[:, 5:8]
    caches = torch.randn(2, 2, 5, 16, 3, 24, device="cuda").to(dtype)
    caches[1] = caches[0]
    slots = torch.tensor([79, 0, -1, 17, -1, 33], device="cuda")
    kv_store(k, v, caches[0], slots)
    stored = slots >= 0
    kv_store_torch(k[stored], v[stored], caches[1], slots[stored])
    assert torch.equal(caches[0], caches[1])


@pytest.mark.parametrize(("num_heads", "head_dim"), [(4, 6), (1, 5), (2, 64), (8, 128), (3, 40)])
@pytest.mark.parametrize("block_size", [16, 48])
def test_pack_and_unpack(
    num_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    shape = (3, 2, 12, block_size, num_heads, head_dim)
    rng = random.Random(num_heads * head_dim)
    for _ in range(8):
        cache = torch.randn(shape, device="cuda").to(dtype)
        block_ids = rng.sample(range(12), rng.randrange(1, 12))
        start = rng.randrange(len(block_ids) * block_size)
        stop = rng.randrange(start + 1, len(block_ids) * block_size + 1)
        first = rng.randrange(3)
        head = rng.randrange(num_heads)
        heads = rng.choice([(0, 0), (head, rng.randrange(head + 1, num_heads + 1))])
        where = KVRange(first, rng.randrange(first + 1, 4), start, stop, *heads)
        wire, expected = torch.empty(
            2, payload_bytes(cache, where), dtype=torch.uint8, device="cuda"
        )
        pack_kv(cache, block_ids, where, wire)
        pack_kv_torch(cache, block_ids, where, expected)
        assert torch.equal(wire, expected), where
        target, other = torch.randn(2, *shape, device="cuda").to(dtype)
        other.copy_(target)
        unpack_kv(target, block_ids, where, wire)
        unpack_kv_torch(other, block_ids, where, wire)
        assert torch.equal(target, other), where


@pytest.mark.parametrize("vocab_size", [5, 3001, 151_936])
def test_noise_is_the_reference_s(vocab_size: int) -> None:
    """With equal logits the noise alone decides; then with temperatures, and greedy."""
    keys = torch.tensor([noise_key(seed, 3) for seed in range(64)])
    temperatures = torch.tensor([0.0, 0.2, 1.0, 1.7] * 16)
    for logits in (torch.zeros(64, vocab_size), torch.randn(64, vocab_size) * 3):
        expected = gumbel_argmax_torch(logits, temperatures, keys)
        got = gumbel_argmax(logits.cuda(), temperatures.cuda(), keys.cuda())
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(40))
def test_tokens_are_those_of_the_cpu(seed: int) -> None:
    logits, draws = random_case(random.Random(seed))
    assert draw_tokens(logits.cuda(), draws) == draw_tokens(logits, draws)


@pytest.mark.parametrize("cut", [{"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_p": 0.999}])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_cuts_of_a_large_vocabulary(cut: dict[str, float], spread: float) -> None:
    """Some keep fewer tokens than are looked at first, some more."""
    logits = torch.randn(16, 151_936) * spread
    draws = [
        Draw(row, noise_key(row, 9), 0.8, **cut)  # type: ignore[arg-type]
        for row in range(16)
    ]
    assert draw_tokens(logits.cuda(), draws) == draw_tokens(logits, draws)


def test_logprobs() -> None:
    logits = torch.randn(4, 151_936) * 2
    wanted = [Wanted(row, 7 * row, 20) for row in range(4)]
    for here, there in zip(
        token_logprobs(logits, wanted), token_logprobs(logits.cuda(), wanted), strict=True
    ):
        assert here.rank == there.rank
        assert here.logprob == pytest.approx(there.logprob, abs=1e-4)
        assert [i for i, _ in here.top] == [i for i, _ in there.top]
