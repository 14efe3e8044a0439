"""Drawing tokens from logits: the noise, the cuts, the winner. Defined in docs/sampling.md.

A token is drawn by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the winner is
argmax(logit / temperature + noise), and the noise of a token is a hash of (seed, position, token
id). No generator has a state, so a draw depends on nothing but its own row, whatever else is in the
batch and wherever it runs.

`draw_tokens` picks an implementation: C or numpy on CPU (one thread for a row, so that sums do not
depend on how many there are), torch elsewhere, with a Triton kernel where the whole vocabulary
needs noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLING = 0x4E544142  # "BATN": domain of the noise that chooses tokens
ACCEPTANCE = 0x43434142  # "BACC": reserved for accepting speculated tokens

GREEDY_BELOW = 1e-5  # a lower temperature is greedy
MASS_BITS = 30  # probability mass is counted in units of 2**-30 of the likeliest token's
_NUM_LIKELIEST = 1024  # tokens of a row, among which a draw with cuts is looked for first
MASK32 = 0xFFFFFFFF
C1, C2, N1 = 0xCC9E2D51, 0x1B873593, 0xE6546B64
F1, F2 = 0x85EBCA6B, 0xC2B2AE35


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw from row `row` of the logits; `key` is `noise_key(seed, position)`."""

    row: int
    key: int
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def is_truncated(self) -> bool:
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def rotl(x: int, bits: int) -> int:
    return ((x << bits) | (x >> (32 - bits))) & MASK32


def noise_key(seed: int, position: int, domain: int = SAMPLING) -> int:
    """State of MurmurHash3_x86_32, seeded with `domain`, after the words `seed` and `position`:
    what all token ids of one draw share.

    Args:
        seed: of the choice, 32 bits.
        position: index of the new token in prompt + output.
    """
    state = domain
    for word in (seed, position):
        state ^= rotl(word * C1 & MASK32, 15) * C2 & MASK32
        state = (rotl(state, 13) * 5 + N1) & MASK32
    return state


def token_hash(keys: Tensor, token_ids: Tensor) -> Tensor:
    """MurmurHash3_x86_32 of (seed, position, token id).

    Args:
        keys: int64, values of `noise_key`, broadcast against token_ids.
        token_ids: int64.

    Returns: int64 in 0..2**32.
    """
    # int64 multiplication wraps modulo 2**64, so its low 32 bits are those of the product.
    k = token_ids * C1 & MASK32
    k = ((k << 15) | (k >> 17)) * C2 & MASK32
    h = keys ^ k
    h = ((h << 13) & MASK32) | (h >> 19)
    h = (h * 5 + N1) & MASK32
    h = h ^ 12  # the length of the key in bytes
    h = (h ^ (h >> 16)) * F1 & MASK32
    h = (h ^ (h >> 13)) * F2 & MASK32
    return h ^ (h >> 16)


def gumbel(hashes: Tensor) -> Tensor:
    """Standard Gumbel noise of 32-bit hashes: int64 → float32.

    u = (hash >> 8 + ½)·2⁻²⁴ needs 25 bits, so the logarithms are taken in float64 and rounded once;
    that makes the result the same on every platform.
    """
    u = ((hashes >> 8).double() + 0.5) * 2.0**-24
    return (-torch.log(-torch.log(u))).float()


def pack(values: Tensor, token_ids: Tensor) -> Tensor:
    """(float32 value, int64 token id) as one int64 that orders by value, then by lower id."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes one of the two zeros
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (MASK32 - token_ids)


def unpack_ids(packed: Tensor) -> Tensor:
    return MASK32 - (packed & MASK32)


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token id per draw, -1 where the row's largest logit is not finite.

    Args:
        logits: [num_rows, vocab_size] float32, contiguous, read only. -inf means "cannot be".
        draws: several may read one row.
    """
    assert logits.dtype is torch.float32, "logits are float32"
    assert logits.is_contiguous(), "logits are contiguous"
    if not draws:
        return []
    if logits.device.type == "cpu":
        from baton.kernels.sampling_cpu import draw_tokens_cpu

        return draw_tokens_cpu(logits, draws)
    return draw_tokens_torch(logits, draws)


def draw_tokens_torch(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """`draw_tokens` on any device."""
    winners = torch.full((len(draws),), -1, dtype=torch.int64, device=logits.device)
    for truncated, draw in ((False, _draw_whole), (True, _draw_truncated)):
        index = [i for i, d in enumerate(draws) if d.is_truncated is truncated]
        if index:
            rows = logits[[draws[i].row for i in index]]
            winners[index] = draw(rows, [draws[i] for i in index])
    return [int(winner) for winner in winners.tolist()]


def _draw_whole(rows: Tensor, draws: Sequence[Draw]) -> Tensor:
    temperatures = [0.0 if d.is_greedy else d.temperature for d in draws]
    keys = [d.key for d in draws]
    return gumbel_argmax(
        rows,
        torch.tensor(temperatures, dtype=torch.float32, device=rows.device),
        torch.tensor(keys, dtype=torch.int64, device=rows.device),
    )


def gumbel_argmax(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """argmax(logits / temperature + noise) per row, ties to the lower id; no noise, no division
    where the temperature is 0.

    Args:
        logits: [N, vocab_size] float32, contiguous.
        temperatures: [N] float32.
        keys: [N] int64, `noise_key` of each row.

    Returns: [N] int64, -1 where the row's largest logit is not finite.
    """
    if logits.is_cuda:
        from baton.kernels.sampling_triton import gumbel_argmax_triton

        return gumbel_argmax_triton(logits, temperatures, keys)
    return gumbel_argmax_torch(logits, temperatures, keys)


def gumbel_argmax_torch(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """`gumbel_argmax` in plain torch, on any device."""
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    noise = gumbel(token_hash(keys[:, None], token_ids))
    greedy = (temperatures == 0)[:, None]
    scores = torch.where(greedy, logits, logits / temperatures[:, None] + noise)
    winners = unpack_ids(pack(scores, token_ids).amax(-1))
    return torch.where(logits.amax(-1).isfinite(), winners, -1)


def _draw_truncated(rows: Tensor, draws: Sequence[Draw]) -> Tensor:
    """From each row's likeliest tokens; rows whose cuts keep more than these are sorted whole,
    which takes a GPU many times as long."""
    num_likeliest = min(_NUM_LIKELIEST, rows.shape[1])
    winners, is_enough = _draw_likeliest(rows, draws, num_likeliest)
    if num_likeliest < rows.shape[1]:
        rest = [index for index, enough in enumerate(is_enough.tolist()) if not enough]
        if rest:
            wide = _draw_likeliest(rows[rest], [draws[index] for index in rest], rows.shape[1])
            winners[rest] = wide[0]
    return winners


def _draw_likeliest(
    rows: Tensor, draws: Sequence[Draw], num_likeliest: int
) -> tuple[Tensor, Tensor]:
    """(token ids drawn from the `num_likeliest` first tokens of each row, whether the row's cuts
    keep no others)."""
    device, vocab_size = rows.device, rows.shape[1]

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    top = rows.amax(-1, keepdim=True)
    temperatures = column([d.temperature for d in draws], torch.float32)
    packed = pack(rows, torch.arange(vocab_size, device=device)).topk(num_likeliest).values
    token_ids = unpack_ids(packed)
    scaled = rows.gather(-1, token_ids) / temperatures
    depth = scaled - top / temperatures
    top_k = column([d.top_k or vocab_size for d in draws], torch.int64)
    kept = torch.arange(num_likeliest, device=device) < top_k
    mass = _mass(depth).where(kept, 0)
    # Sums of integers, so that it does not matter in which order.
    whole = _mass(rows / temperatures - top / temperatures).sum(-1, keepdim=True)
    total = torch.where(top_k < vocab_size, mass.sum(-1, keepdim=True), whole)
    top_p = column([d.top_p for d in draws], torch.float64)
    ahead = mass.cumsum(-1)
    kept &= (ahead - mass < top_p * total) | (top_p == 1)
    least = column([d.min_p for d in draws], torch.float64).log().float()
    kept &= depth >= least
    is_last = (ahead[:, -1:] >= top_p * total) & (top_p < 1) | (depth[:, -1:] < least)
    is_enough = (top_k <= num_likeliest) | (is_last & (top_k >= vocab_size))
    noise = gumbel(token_hash(column([d.key for d in draws], torch.int64), token_ids))
    scores = (scaled + noise).where(kept, -torch.inf)
    winners = unpack_ids(pack(scores, token_ids).amax(-1))
    return torch.where(top[:, 0].isfinite(), winners, -1), is_enough[:, 0]


def _mass(depth: Tensor) -> Tensor:
    """Probability in units of 2**-MASS_BITS of the likeliest token's, int64."""
    return (depth.exp() * float(2**MASS_BITS)).long()
