"""A 64-bit digest of payloads that are in device memory, where no library's checksum runs.

    digest = Σ fmix64(i · 2³² + word i) mod 2⁶⁴        over the payload's 32-bit words, i from 0

fmix64 is MurmurHash3's finalizer (A. Appleby, public domain), a bijection of 64 bits: one word that
differs always gives another digest, and so do words that changed places, but for one case in 2⁶⁴.
A sum has no order, so any number of threads may take part and the bits stay the same.

A Triton kernel for CUDA; plain torch as the reference, which is also what CPU tensors get.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_FACTORS = (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64)  # as signed integers
_LOW_31_BITS = 2**31 - 1


def payload_digests(payloads: Sequence[Tensor]) -> Tensor:
    """[num_payloads] int64 on the payloads' device: the digest of each, as a signed integer.

    Args:
        payloads: [num_bytes] uint8 each, contiguous, of whole 32-bit words, fewer than 2³².

    Raises:
        ValueError: a payload is not so.
    """
    for payload in payloads:
        is_plain = payload.dtype is torch.uint8 and payload.is_contiguous()
        if not is_plain or payload.numel() % 4 or payload.numel() >> 34:
            raise ValueError(f"no payload: {payload.dtype}, {tuple(payload.shape)}")
    if not payloads or payloads[0].device.type == "cpu":
        return payload_digests_torch(payloads)
    from baton.kernels.payload_digest_triton import payload_digests_triton

    return payload_digests_triton(payloads)


def payload_digests_torch(payloads: Sequence[Tensor]) -> Tensor:
    """`payload_digests` in plain torch, on any device."""
    return torch.stack([_digest(p) for p in payloads]) if payloads else torch.empty(0).long()


def _digest(payload: Tensor) -> Tensor:
    words = payload.view(torch.int32).long() & (2**32 - 1)
    mixed = words | (torch.arange(len(words), device=words.device) << 32)
    for factor in _FACTORS:
        mixed = (mixed ^ (mixed >> 33 & _LOW_31_BITS)) * factor
    return (mixed ^ (mixed >> 33 & _LOW_31_BITS)).sum()
