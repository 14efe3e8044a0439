"""The Triton kernel behind `baton.kernels.payload_digest`."""
# Triton reads a kernel's annotations as its own types, so kernels stay without them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_WORDS = 4096


@triton.jit
def _fmix64(x):
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53
    return x ^ (x >> 33)


@triton.jit(do_not_specialize=["num_words"])
def _digest_kernel(words_ptr, digest_ptr, num_words, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    in_range = at < num_words
    words = tl.load(words_ptr + at, mask=in_range, other=0).to(tl.uint32, bitcast=True)
    mixed = _fmix64(words.to(tl.uint64) | (at.to(tl.uint64) << 32))
    share = tl.where(in_range, mixed.to(tl.int64, bitcast=True), 0)
    tl.atomic_add(digest_ptr, tl.sum(share))


def payload_digests_triton(payloads: Sequence[Tensor]) -> Tensor:
    """`payload_digests`; the caller has checked the arguments."""
    digests = torch.zeros(len(payloads), dtype=torch.int64, device=payloads[0].device)
    for index, payload in enumerate(payloads):
        words = payload.view(torch.int32)
        if len(words):
            grid = (triton.cdiv(len(words), _TILE_WORDS),)
            _digest_kernel[grid](words, digests[index:], len(words), TILE=_TILE_WORDS)
    return digests
