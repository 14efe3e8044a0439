"""POST /v1/embeddings."""

import base64
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from baton.gateway.answers import public_id
from baton.gateway.context import Context
from baton.gateway.pooling_answers import Pooling, PoolingAnswer
from baton.gateway.pooling_fields import EmbeddingRequest
from baton.gateway.pooling_inputs import InputEncoder, parse_inputs
from baton.pooling import PoolingTask
from baton.scoring import to_vector

PATH = "/v1/embeddings"


def embeddings_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["Pooling"])

    @router.post(PATH, response_class=Response)
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return answer(context, body, request, PATH)

    return router


def answer(context: Context, body: EmbeddingRequest, request: Request, endpoint: str) -> Response:
    """
    Raises:
        BatonError: refused.
    """
    model, pooling = context.find_pooler(body.model, PoolingTask.EMBED)
    body.check()
    inputs = [] if body.messages else parse_inputs(context, body)
    pooling.check_dimensions(body.dimensions, model.name)
    encoder = InputEncoder(context, body, model)
    response_id = public_id("embd", body.request_id, request)

    async def work(job: Pooling) -> Callable[[], dict[str, Any]]:
        if body.messages:
            encoded = await encoder.chat(body)
        else:
            adds = body.add_special_tokens is not False
            encoded = await encoder.texts(inputs, "input", add_special_tokens=adds)
        results = await job.results(encoded, body.dimensions)
        return lambda: {
            "id": response_id,
            "object": "list",
            "created": int(time.time()),  # for people; nothing is measured with it
            "model": model.name,
            "data": [
                {"index": index, "object": "embedding", "embedding": _encode(body, result)}
                for index, result in enumerate(results)
            ],
            "usage": job.usage(),
        }

    return PoolingAnswer(context, body, model.name, request, endpoint, work)


def _encode(body: EmbeddingRequest, result: bytes) -> list[float] | str:
    if body.encoding_format == "float":
        return to_vector(result)
    order = sys.byteorder if body.endianness == "native" else body.endianness
    width = np.dtype(body.embed_dtype).itemsize
    kind = f"{'<' if order == 'little' else '>'}f{width}"
    return base64.b64encode(np.frombuffer(result, "<f4").astype(kind).tobytes()).decode("ascii")
