"""Embeddings and scores of a running fleet, as `baton.outputs`."""

import base64
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from baton.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from baton.pooling import PoolingParams
from baton.scoring import Pair, pair_up, to_vector

Post = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
# Enough for texts that several pairs have in common to be looked at once.
_PAIRS_IN_A_REQUEST = 64


def embed_job(
    post: Post, text: str | None, ids: tuple[int, ...] | None, params: PoolingParams
) -> Callable[[], Coroutine[Any, Any, EmbeddingRequestOutput]]:
    """Of one input. The API does not say the token ids of a text."""
    body = {
        **asdict(params),
        "input": text if ids is None else [list(ids)],
        "encoding_format": "base64",
        "endianness": "little",
    }

    async def job() -> EmbeddingRequestOutput:
        answer = await post("/v1/embeddings", body)
        vector = to_vector(base64.b64decode(answer["data"][0]["embedding"]))
        return EmbeddingRequestOutput(answer["id"], EmbeddingOutput(vector), list(ids or ()))

    return job


def score_jobs(
    post: Post,
    data_1: str | Sequence[str],
    data_2: str | Sequence[str],
    params: PoolingParams,
) -> list[Callable[[], Coroutine[Any, Any, list[ScoringRequestOutput]]]]:
    """Each of some pairs, in their order.

    Raises:
        InvalidRequest: the texts do not go together.
    """
    first, second = ([d] if isinstance(d, str) else d for d in (data_1, data_2))
    pairs = pair_up(first, second, "data_2")
    step = _PAIRS_IN_A_REQUEST
    return [_score_job(post, pairs[i : i + step], params) for i in range(0, len(pairs), step)]


def _score_job(
    post: Post, pairs: Sequence[Pair], params: PoolingParams
) -> Callable[[], Coroutine[Any, Any, list[ScoringRequestOutput]]]:
    firsts, seconds = (list(side) for side in zip(*pairs, strict=True))
    options = {name: value for name, value in asdict(params).items() if name != "dimensions"}
    body = {**options, "text_1": firsts, "text_2": seconds}

    async def job() -> list[ScoringRequestOutput]:
        answer = await post("/score", body)
        return [
            ScoringRequestOutput(
                f"{answer['id']}-{entry['index']}", ScoringOutput(entry["score"]), []
            )
            for entry in answer["data"]
        ]

    return job
