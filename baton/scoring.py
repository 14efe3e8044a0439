"""What scores over HTTP and offline have in common: which texts go together, and how well, going by
their embeddings. No torch."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from baton.errors import InvalidRequest

Pair = tuple[str, str]


def pair_up(first: Sequence[str], second: Sequence[str], param: str) -> list[Pair]:
    """One text with each of the others, or two lists side by side.

    Raises:
        InvalidRequest: they do not go together.
    """
    if len(first) == 1:
        first = list(first) * len(second)
    if len(first) != len(second) or not second:
        raise InvalidRequest("Input lengths must be either 1:1, 1:N or N:N.", param)
    return list(zip(first, second, strict=True))


def distinct_texts(pairs: Sequence[Pair]) -> list[str]:
    """Each text once, however many pairs it is in."""
    return list(dict.fromkeys(text for pair in pairs for text in pair))


def to_vector(result: bytes) -> list[float]:
    """Of a result, float32 little-endian."""
    values: list[float] = np.frombuffer(result, "<f4").tolist()
    return values


def to_scores(results: Sequence[bytes]) -> list[float]:
    """Of results of a cross-encoder, float32 little-endian."""
    return [float(np.frombuffer(result, "<f4")[0]) for result in results]


def to_cosines(pairs: Sequence[Pair], results: Sequence[bytes]) -> list[float]:
    """`results`: the embeddings of `distinct_texts(pairs)`, float32 little-endian."""
    vectors = [np.frombuffer(result, "<f4").astype(np.float64) for result in results]
    of = dict(zip(distinct_texts(pairs), vectors, strict=True))
    return [cosine(of[first], of[second]) for first, second in pairs]


def cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Of the angle between two vectors; 0 if one has no direction."""
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.dot(a, b)) / norms if norms else 0.0
