"""RMSNorm, RoPE and the KV store: the Triton kernels (interpreted) equal the torch references, and
those equal the formulas."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from baton.kernels.kv_store import kv_store_torch
from baton.kernels.kv_store_triton import kv_store_triton
from baton.kernels.rms_norm import rms_norm_torch
from baton.kernels.rms_norm_triton import rms_norm_triton
from baton.kernels.rope import rope_torch
from baton.kernels.rope_triton import rope_triton
from baton.kernels.silu_mul import silu_mul_torch
from baton.kernels.silu_mul_triton import silu_mul_triton

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


@pytest.mark.parametrize("shape", [(5, 64), (1, 33), (3, 4, 16), (2, 7, 80)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.randn(shape[0], *(size + 3 for size in shape[1:-1]), shape[-1]).to(dtype)
    x = wide[:, : shape[1]] if len(shape) == 3 else wide  # heads are a slice of a wider tensor
    weight = torch.randn(shape[-1]).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    for norm in (rms_norm_torch, rms_norm_triton):
        got = norm(x, weight, 1e-3)
        assert got.dtype is dtype
        assert got.is_contiguous()
        assert (got - exact * weight.double()).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_rope(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, heads + 2, head_dim).to(dtype)[:, :heads]
    angles = torch.rand(4, head_dim // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    cos_sin = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
    pairs = torch.complex(*x.double().unflatten(-1, (2, -1)).unbind(-2))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None].to(pairs.dtype)
    expected = torch.cat((turned.real, turned.imag), -1)
    for rotate in (rope_torch, rope_triton):
        got = rotate(x, cos_sin)
        assert got.dtype is dtype
        assert (got - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("size", [16, 1024, 1500])
def test_silu_mul(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 2 * size) * 3).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    expected = gate * gate.sigmoid() * up
    for op in (silu_mul_torch, silu_mul_triton):
        got = op(x)
        assert got.dtype is dtype
        assert ((got - expected).abs() <= TOLERANCE[dtype] * expected.abs().clamp(min=1)).all()


def test_a_token_with_a_negative_slot_is_not_stored() -> None:
    k = torch.ones(3, 2, 16)
    cache = torch.zeros(2, 4, 16, 2, 16)
    kv_store_triton(k, k, cache, torch.tensor([5, -1, 63]))
    stored = cache.flatten(1, 2).flatten(2).any(2)
    assert stored.nonzero().tolist() == [[0, 5], [0, 63], [1, 5], [1, 63]]


def test_kv_store(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = torch.randn(6, 9, 24).to(dtype)
    k, v = heads[:, 2:5], heads[:, 5:8]
    slots = torch.tensor([3, 60, 0, 17, 16, 63])
    before = torch.randn(2, 4, 16, 3, 24).to(dtype)
    for store in (kv_store_torch, kv_store_triton):
        cache = before.clone()
        store(k, v, cache, slots)
        for token, slot in enumerate(slots.tolist()):
            assert torch.equal(cache[0, slot // 16, slot % 16], k[token])
            assert torch.equal(cache[1, slot // 16, slot % 16], v[token])
        kept = torch.ones(64, dtype=torch.bool)
        kept[slots] = False
        assert torch.equal(cache.flatten(1, 2)[:, kept], before.flatten(1, 2)[:, kept])
