"""POST /invocations: SageMaker's one door, behind which a body's shape says what it is."""

from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError, WithJsonSchema

from baton.errors import InvalidRequest
from baton.gateway import chat, completions, embeddings, scoring
from baton.gateway.context import Context
from baton.gateway.openai import ChatCompletionRequest, CompletionRequest
from baton.gateway.pooling_fields import EmbeddingRequest, RerankRequest, ScoreRequest

PATH = "/invocations"
_SCHEMA = {
    "anyOf": [
        {"$ref": f"#/components/schemas/{body.__name__}"}
        for body in (
            CompletionRequest,
            ChatCompletionRequest,
            EmbeddingRequest,
            ScoreRequest,
            RerankRequest,
        )
    ]
}
Invocation = Annotated[dict[str, Any], WithJsonSchema(_SCHEMA)]
Parsed = TypeVar("Parsed", bound=BaseModel)


def invocations_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["SageMaker"])

    @router.post(PATH, response_class=Response)
    async def invoke(body: Invocation, request: Request) -> Response:
        pooled = _pooling(context, body, request)
        if pooled is not None:
            return pooled
        if body.get("messages") is not None:
            return chat.answer(context, _parse(ChatCompletionRequest, body), request, PATH)
        if body.get("prompt") is not None:
            return completions.answer(context, _parse(CompletionRequest, body), request, PATH)
        raise InvalidRequest(
            "The body needs a prompt, messages, input, text_1 and text_2, or a query and documents."
        )

    return router


def _pooling(context: Context, body: dict[str, Any], request: Request) -> Response | None:
    """For a body that asks for embeddings or scores."""
    if body.get("input") is not None:
        return embeddings.answer(context, _parse(EmbeddingRequest, body), request, PATH)
    if body.get("query") is not None:
        return scoring.rerank(context, _parse(RerankRequest, body), request, PATH)
    if any(body.get(name) is not None for name in ("text_1", "queries", "data_1")):
        return scoring.score(context, _parse(ScoreRequest, body), request, PATH)
    return None


def _parse(kind: type[Parsed], body: dict[str, Any]) -> Parsed:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
