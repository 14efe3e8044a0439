"""`draw_tokens` on CPU: each row by itself, and only the ids that can win get noise. In C
(draw_token.c) where that was built and the only cut of a draw is top-p, else in numpy.

A row is one thread's on purpose: its result must not depend on how many threads a worker has. The
rows of a step are divided among them.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.sampling import C1, C2, F1, F2, MASS_BITS, N1, Draw, rotl

try:
    from baton.kernels import _draw_token
except ImportError:
    _draw_token = None  # type: ignore[assignment]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
Words = npt.NDArray[np.uint32]

MAX_NOISE = 17.33  # of gumbel(2**32 - 1), rounded up
_LARGEST = float(np.finfo(np.float32).max)
_FIRST_LOOK = 256  # ids whose mass is looked at before a whole row is sorted into buckets
_WIDE_MASS = 4 * _FIRST_LOOK << MASS_BITS  # more than the likeliest few can have
_NUM_BUCKETS = 4096
_BUCKETS_PER_NAT = 64


def draw_tokens_cpu(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """See `draw_tokens`; logits on CPU."""
    rows = logits.numpy()
    num_threads = torch.get_num_threads()
    if num_threads == 1 or sum(not draw.is_greedy for draw in draws) < 2:
        return [_draw(rows[draw.row], draw) for draw in draws]
    return list(_pool(num_threads).map(lambda draw: _draw(rows[draw.row], draw), draws))


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, "baton-draw")


def _draw(row: Floats, draw: Draw) -> int:
    best = int(row.argmax())  # the first of equals, or a NaN
    if not math.isfinite(row[best]):
        return -1
    if draw.is_greedy:
        return best
    words = _vocabulary_words(len(row))
    is_nucleus = 0 < draw.top_p < 1 and draw.top_k <= 0 and draw.min_p <= 0
    is_scored = abs(float(row[best])) / draw.temperature < _LARGEST
    if _draw_token is not None and is_nucleus and is_scored:
        mass = np.empty(len(row), np.int32)
        return _draw_token.draw_token(
            row.data, words.data, mass.data, best, draw.key, draw.temperature, draw.top_p
        )
    if is_nucleus:
        return _draw_from_nucleus(row, words, row[best], draw)
    return _pick_among(_survivors(row, row[best], draw), row, words, draw)


def _pick_among(ids: Ids | None, row: Floats, words: Words, draw: Draw) -> int:
    """`ids` ascending; None = all."""
    if ids is None:
        return _pick(row, words, draw)
    return int(ids[_pick(row[ids], words[ids], draw)])


def _draw_from_nucleus(row: Floats, words: Words, top: np.float32, draw: Draw) -> int:
    """A wide nucleus has most of the probability, so the winner among all ids is usually in it, and
    then wins there too; its end need not be found. If it is not, nothing behind it is either."""
    mass, need = _mass_and_need(row, top, draw)
    ids = None
    if need < _WIDE_MASS:
        ids = _narrow_nucleus(row, mass, need)
        if ids is not None:
            return _pick_among(ids, row, words, draw)
    while True:
        winner = _pick_among(ids, row, words, draw)
        if _mass_ahead(row, mass, winner) < need:
            return winner
        ids = _ids_to(row, winner)
        ids = ids[ids != winner]


# ── noise ────────────────────────────────────────────────────────────────────────────────────────


def token_words(token_ids: npt.ArrayLike) -> Words:
    """What a token id contributes to its hash, whatever the key: rotl13 of MurmurHash3's mixed
    word. Rotation distributes over xor, so both halves can be rotated ahead of it."""
    k = np.asarray(token_ids).astype(np.uint32)
    k *= np.uint32(C1)
    k = (k << np.uint32(15)) | (k >> np.uint32(17))
    k *= np.uint32(C2)
    return (k << np.uint32(13)) | (k >> np.uint32(19))


@lru_cache(maxsize=2)
def _vocabulary_words(vocab_size: int) -> Words:
    return token_words(np.arange(vocab_size))


def token_hash(key: int, words: Words) -> Words:
    """MurmurHash3_x86_32 of (seed, position, token id) from `noise_key` and `token_words`."""
    h = words ^ np.uint32(rotl(key, 13))
    h *= np.uint32(5)
    h += np.uint32(N1)
    h ^= np.uint32(12)
    shifted = h >> np.uint32(16)
    h ^= shifted
    h *= np.uint32(F1)
    h ^= np.right_shift(h, np.uint32(13), out=shifted)
    h *= np.uint32(F2)
    h ^= np.right_shift(h, np.uint32(16), out=shifted)
    return h


def gumbel(hashes: Words) -> Floats:
    """As in `baton.kernels.sampling`."""
    u = ((hashes >> np.uint32(8)) + 0.5) * 2.0**-24
    noise: Floats = (-np.log(-np.log(u))).astype(np.float32)
    return noise


def _least_hash(noise: float) -> int:
    """A hash below which the noise is certainly less than `noise`."""
    u = math.exp(-math.exp(-noise))
    return max(int(u * 2.0**24) - 2, 0) << 8


# ── the winner ───────────────────────────────────────────────────────────────────────────────────


def _pick(logits: Floats, words: Words, draw: Draw) -> int:
    """Index of the best-scoring element, the lower of equals.

    Of many, the likeliest are scored first. The rest lies below a known logit, so only those with a
    hash above some threshold can still win; usually few need hashing at all.
    """
    likely, floor = likeliest(logits, 2 * _FIRST_LOOK)
    winner, score = _best(logits, words, likely, draw)
    slack = 1e-3 + abs(score) * 1e-6  # covers the rounding of scores
    reach = score - float(floor / np.float32(draw.temperature)) - slack
    if reach > MAX_NOISE or len(likely) == len(logits):
        return winner
    if not math.isfinite(reach):  # scores overflow at tiny temperatures
        return _best(logits, words, np.arange(len(logits)), draw)[0]
    least = np.uint32(_least_hash(reach))
    nearest = np.float32((score - slack - MAX_NOISE) * draw.temperature)
    some = logits[: len(logits) // 8]  # how many are near enough to win, at any hash
    if 4 * np.count_nonzero(some >= nearest) < len(some):
        rest = np.flatnonzero(logits >= nearest)
        rest = rest[token_hash(draw.key, words[rest]) >= least]
    else:
        rest = np.flatnonzero(token_hash(draw.key, words) >= least)
    return _best(logits, words, np.concatenate((likely, rest)), draw)[0]


def _best(logits: Floats, words: Words, index: Ids, draw: Draw) -> tuple[int, float]:
    """Of the elements in `index`."""
    noise = gumbel(token_hash(draw.key, words[index]))
    scores = logits[index] / np.float32(draw.temperature) + noise
    score = scores.max()
    return int(index[scores == score].min()), float(score)


def likeliest(row: Floats, count: int) -> tuple[Ids, np.float32]:
    """At least `count` ids (or all that can be), ascending, and a logit that all others are below.

    The `count`-th largest of the maxima of disjoint blocks bounds the `count`-th largest element
    from below, and is found without sorting.
    """
    num_blocks = max(4 * count, 2048)
    if len(row) < 2 * num_blocks:
        return np.arange(len(row)), row.min()
    length = len(row) // num_blocks
    maxima = row[: length * num_blocks].reshape(length, num_blocks).max(axis=0)
    floor = np.partition(maxima, num_blocks - count)[num_blocks - count]
    if floor == -np.inf:  # the rest cannot be, so nobody misses it
        return np.flatnonzero(row > floor), floor
    return np.flatnonzero(row >= floor), floor


# ── cuts ─────────────────────────────────────────────────────────────────────────────────────────


def _survivors(row: Floats, top: np.float32, draw: Draw) -> Ids | None:
    """Ids, ascending, that pass top-k, then top-p, then min-p; None = all. Each cut keeps a prefix
    of the ids in order (larger logit first, then lower id)."""
    ids = None
    if 0 < draw.top_k < len(row):
        ids = in_order(row, likeliest(row, draw.top_k)[0])[: draw.top_k]
        if draw.top_p < 1:
            mass = _mass(row[ids], top, draw)
            ids = ids[: _prefix(mass, draw.top_p * float(mass.sum(dtype=np.int64)))]
        ids.sort()
    elif draw.top_p < 1:
        ids = _nucleus(row, top, draw)
    if draw.min_p > 0:
        logits = row if ids is None else row[ids]
        kept = np.flatnonzero(_depth(logits, top, draw) >= np.float32(math.log(draw.min_p)))
        ids = kept if ids is None else ids[kept]
    return ids


def _depth(logits: Floats, top: np.float32, draw: Draw) -> Floats:
    temperature = np.float32(draw.temperature)
    depth = logits / temperature
    depth -= top / temperature
    return depth


def _mass(logits: Floats, top: np.float32, draw: Draw) -> npt.NDArray[np.int32]:
    """Likelihood relative to the likeliest, in whole units of 2**-MASS_BITS: sums are exact in any
    order."""
    mass = _depth(logits, top, draw)
    np.exp(mass, out=mass)
    mass *= np.float32(2**MASS_BITS)
    return mass.astype(np.int32)


def _prefix(mass: npt.NDArray[np.int32], need: float) -> int:
    """Length of the shortest prefix with at least `need`, or of all."""
    total = np.cumsum(mass, dtype=np.int64)
    return min(int(np.searchsorted(total, need)) + 1, len(mass))


def in_order(row: Floats, ids: Ids) -> Ids:
    """`ids` (ascending) by falling logit."""
    return ids[np.argsort(-row[ids], kind="stable")]


def _nucleus(row: Floats, top: np.float32, draw: Draw) -> Ids:
    mass, need = _mass_and_need(row, top, draw)
    ids = _narrow_nucleus(row, mass, need)
    return _wide_nucleus(row, top, mass, need) if ids is None else ids


def _mass_and_need(row: Floats, top: np.float32, draw: Draw) -> tuple[npt.NDArray[np.int32], float]:
    """Of every id, and what those of a nucleus make together, at least."""
    mass = _mass(row, top, draw)
    return mass, draw.top_p * float(mass.sum(dtype=np.int64))


def _mass_ahead(row: Floats, mass: npt.NDArray[np.int32], token_id: int) -> float:
    """Of the ids before this one, in order: in the nucleus if that is less than its need."""
    logit = row[token_id]
    larger = mass * (row > logit)
    num_equal = np.count_nonzero(row[:token_id] == logit)
    return float(int(larger.sum(dtype=np.int64)) + num_equal * int(mass[token_id]))


def _narrow_nucleus(row: Floats, mass: npt.NDArray[np.int32], need: float) -> Ids | None:
    """None: it is too wide to be found among the likeliest."""
    ids = in_order(row, likeliest(row, _FIRST_LOOK)[0])
    if float(mass[ids].sum(dtype=np.int64)) >= need or len(ids) == len(row):
        return np.sort(ids[: _prefix(mass[ids], need)])
    return None


def _wide_nucleus(row: Floats, top: np.float32, mass: npt.NDArray[np.int32], need: float) -> Ids:
    return _ids_to(row, _last_of_flat_nucleus(row, top, mass, need))


def _ids_to(row: Floats, last: int) -> Ids:
    """Ids, ascending, that come before `last` in order, and `last` itself."""
    kept = row > row[last]
    kept[: last + 1] |= row[: last + 1] == row[last]
    return np.flatnonzero(kept)


def _last_of_flat_nucleus(
    row: Floats, top: np.float32, mass: npt.NDArray[np.int32], need: float
) -> int:
    """The last id, in order, of a nucleus too wide to sort: found in one of many buckets of like
    logits."""
    bucket = np.minimum((top - row) * np.float32(_BUCKETS_PER_NAT), np.float32(_NUM_BUCKETS - 1))
    bucket = bucket.astype(np.int32)
    # float64 holds these integers exactly.
    total = np.cumsum(np.bincount(bucket, weights=mass, minlength=_NUM_BUCKETS))
    crossed = int(np.searchsorted(total, need))
    before = float(total[crossed - 1]) if crossed else 0.0
    ids = in_order(row, np.flatnonzero(bucket == crossed))
    return int(ids[_prefix(mass[ids], need - before) - 1])
