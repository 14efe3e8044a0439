"""The Triton kernel behind `gumbel_argmax`: hash, noise and argmax in one pass over the logits."""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.sampling import C1, C2, F1, F2, N1, unpack_ids

_LEAST = -(2**63)
_NOT_FINITE = 2**63 - 1  # above every packed score


@triton.jit(do_not_specialize=["tiles_per_program"])
def _gumbel_argmax_kernel(
    logits_ptr,  # [N, vocab_size] float32
    temperatures_ptr,  # [N] float32
    keys_ptr,  # [N] int32
    out_ptr,  # [N] int64: the largest packed (score, id)
    vocab_size,
    tiles_per_program,
    C1: tl.constexpr,
    C2: tl.constexpr,
    N1: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    LEAST: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    key = tl.load(keys_ptr + row).to(tl.uint32, bitcast=True)
    best = tl.full((TILE,), LEAST, tl.int64)
    for tile in range(tiles_per_program):
        ids = (tl.program_id(1) * tiles_per_program + tile) * TILE + tl.arange(0, TILE)
        inside = ids < vocab_size
        logits = tl.load(logits_ptr + row * vocab_size + ids, mask=inside, other=float("-inf"))
        if temperature == 0.0:
            scores = logits + 0.0
        else:
            k = ids.to(tl.uint32) * C1
            k = ((k << 15) | (k >> 17)) * C2
            h = key ^ k
            h = (h << 13) | (h >> 19)
            h = h * 5 + N1
            h = h ^ 12
            h = (h ^ (h >> 16)) * F1
            h = (h ^ (h >> 13)) * F2
            h = h ^ (h >> 16)
            u = ((h >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08  # 2**-24
            noise = (-tl.log(-tl.log(u))).to(tl.float32)
            scores = tl.div_rn(logits, temperature) + noise + 0.0
        bits = scores.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
        broken = ~(logits < float("inf"))  # NaN included
        best = tl.maximum(best, tl.where(inside, tl.where(broken, NOT_FINITE, packed), best))
    tl.atomic_max(out_ptr + row, tl.max(best, axis=0))


def gumbel_argmax_triton(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """See `gumbel_argmax`; arguments are the same."""
    num_rows, vocab_size = logits.shape
    tile = 1024
    num_tiles = triton.cdiv(vocab_size, tile)
    tiles_per_program = 4 if num_rows > 8 else 1  # few rows: spread each over the whole device
    out = torch.full((num_rows,), _LEAST, dtype=torch.int64, device=logits.device)
    grid = (num_rows, triton.cdiv(num_tiles, tiles_per_program))
    _gumbel_argmax_kernel[grid](
        logits,
        temperatures,
        keys.to(torch.int32),
        out,
        vocab_size,
        tiles_per_program,
        C1=C1,
        C2=C2,
        N1=N1,
        F1=F1,
        F2=F2,
        LEAST=_LEAST,
        NOT_FINITE=_NOT_FINITE,
        TILE=tile,
        # A fused multiply-add would round the score once instead of twice.
        enable_fp_fusion=False,
    )
    # -inf as the best score leaves the id meaningless: the row had no finite logit.
    nothing = (out >> 32) <= _ordered_minus_inf()
    return torch.where(nothing | (out == _NOT_FINITE), -1, unpack_ids(out))


def _ordered_minus_inf() -> int:
    bits = torch.tensor(-torch.inf).view(torch.int32)
    return int(bits ^ 0x7FFFFFFF)
