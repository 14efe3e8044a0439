"""POST /score and /rerank: how well two texts go together.

A cross-encoder looks at each pair at once. An embedding model looks at each text, and the score is
the cosine of the angle between the two embeddings.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from baton.gateway.answers import public_id
from baton.gateway.context import Context
from baton.gateway.pooling_answers import Pooling, PoolingAnswer
from baton.gateway.pooling_fields import RerankRequest, ScoreRequest
from baton.gateway.pooling_inputs import InputEncoder, check_num_inputs
from baton.pooling import PoolingInfo, PoolingTask
from baton.scoring import Pair, distinct_texts, to_cosines, to_scores

SCORE_PATHS = ("/score", "/v1/score")
RERANK_PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
_TASKS = (PoolingTask.SCORE, PoolingTask.EMBED)


def scoring_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["Pooling"])

    async def create_score(body: ScoreRequest, request: Request) -> Response:
        return score(context, body, request, request.scope["route"].path)

    async def create_rerank(body: RerankRequest, request: Request) -> Response:
        return rerank(context, body, request, request.scope["route"].path)

    for path in SCORE_PATHS:
        router.post(path, response_class=Response)(create_score)
    for path in RERANK_PATHS:
        router.post(path, response_class=Response)(create_rerank)
    return router


def score(context: Context, body: ScoreRequest, request: Request, endpoint: str) -> Response:
    """
    Raises:
        BatonError: refused.
    """
    model, pooling = context.find_pooler(body.model, *_TASKS)
    pairs = body.pairs()
    check_num_inputs(context, len(pairs), "text_2")
    encoder = InputEncoder(context, body, model)
    response_id = public_id("score", body.request_id, request)

    async def work(job: Pooling) -> Callable[[], dict[str, Any]]:
        scores = await _scores(job, encoder, pooling, pairs, "text_2")
        return lambda: {
            "id": response_id,
            "object": "list",
            "created": int(time.time()),  # for people; nothing is measured with it
            "model": model.name,
            "data": [
                {"index": index, "object": "score", "score": value}
                for index, value in enumerate(scores)
            ],
            "usage": job.usage(),
        }

    return PoolingAnswer(context, body, model.name, request, endpoint, work)


def rerank(context: Context, body: RerankRequest, request: Request, endpoint: str) -> Response:
    """
    Raises:
        BatonError: refused.
    """
    model, pooling = context.find_pooler(body.model, *_TASKS)
    check_num_inputs(context, len(body.documents), "documents")
    pairs = [(body.query, document) for document in body.documents]
    encoder = InputEncoder(context, body, model)
    response_id = public_id("rerank", body.request_id, request)

    async def work(job: Pooling) -> Callable[[], dict[str, Any]]:
        scores = await _scores(job, encoder, pooling, pairs, "documents")
        best = sorted(range(len(scores)), key=lambda index: -scores[index])
        return lambda: {
            "id": response_id,
            "model": model.name,
            "usage": job.usage(),
            "results": [
                {
                    "index": index,
                    "document": {"text": body.documents[index], "multi_modal": None},
                    "relevance_score": scores[index],
                }
                for index in best[: body.top_n or None]
            ],
        }

    return PoolingAnswer(context, body, model.name, request, endpoint, work)


async def _scores(
    job: Pooling,
    encoder: InputEncoder,
    pooling: PoolingInfo,
    pairs: Sequence[Pair],
    param: str,
) -> list[float]:
    if pooling.task is PoolingTask.SCORE:
        return to_scores(await job.results(await encoder.pairs(pairs, param)))
    return to_cosines(pairs, await job.results(await encoder.texts(distinct_texts(pairs), param)))
