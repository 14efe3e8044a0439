"""POST /tokenize and /detokenize: the tokenizer as the gateway itself uses it."""

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from fastapi.routing import APIRoute
from pydantic import Field
from pydantic_core import to_json

from baton.errors import InvalidRequest
from baton.gateway.chat_fields import ChatFields
from baton.gateway.context import Context
from baton.gateway.fields import Bool, Fields, Text, TokenIds
from baton.gateway.prompts import check_num_chars


class TokenizeRequest(ChatFields):
    """A text or a chat."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[dict[str, Any]] = Field([], max_length=2048)
    add_special_tokens: Bool | None = Field(  # type: ignore[assignment]
        None, description="true for a text, false for a chat, whose template writes them."
    )
    return_token_strs: Bool = False
    return_prompt_text: Bool = False


class DetokenizeRequest(Fields):
    model: Text | None = None
    tokens: TokenIds
    skip_special_tokens: Bool = False
    return_token_strs: Bool = False


def tokenization_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["Tokens"])

    @router.post("/tokenize", response_class=Response)
    async def tokenize(body: TokenizeRequest) -> Response:
        body.check_template()
        max_model_len = context.find_model(body.model).max_model_len
        ids, text = await _encode(context, body)
        if len(ids) > context.limits.max_request_tokens:
            raise InvalidRequest(f"It has {len(ids)} tokens, more than one request may.", "prompt")
        return await asyncio.to_thread(_answer, context, body, ids, text, max_model_len)

    @router.post("/detokenize", response_class=Response)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Special tokens are kept unless `skip_special_tokens`; ids that the vocabulary lacks add
        nothing."""
        context.find_model(body.model)
        skip = body.skip_special_tokens
        text = await context.tokenizers.decode(body.tokens, skip_special_tokens=skip)
        answer: dict[str, Any] = {"prompt": text}
        if body.return_token_strs:
            answer["token_strs"] = await asyncio.to_thread(_strings, context, body.tokens)
        return _json(answer)

    return router


async def _encode(context: Context, body: TokenizeRequest) -> tuple[list[int], str]:
    """Ids, and the text that they are of."""
    if (body.prompt is None) == (not body.messages):
        raise InvalidRequest("Give either prompt or messages.", "prompt")
    limits, param = context.limits, "messages" if body.prompt is None else "prompt"
    if body.prompt is not None:
        text, adds = body.prompt, True
    else:
        options = body.template_options()
        text, adds = await context.tokenizers.render_chat(body.messages, **options), False
    if body.add_special_tokens is not None:
        adds = body.add_special_tokens
    check_num_chars(len(text), limits.max_request_tokens, limits, param)
    return await context.tokenizers.encode(text, add_special_tokens=adds), text


def _answer(
    context: Context, body: TokenizeRequest, ids: list[int], text: str, max_model_len: int
) -> Response:
    answer = {
        "count": len(ids),
        "max_model_len": max_model_len,
        "tokens": ids,
        "token_strs": _strings(context, ids) if body.return_token_strs else None,
    }
    if body.return_prompt_text:
        answer["prompt_text"] = text
    return _json(answer)


def _strings(context: Context, ids: list[int]) -> list[str]:
    token_bytes = context.tokenizers.tokenizer.token_bytes
    return [token_bytes(token_id).decode(errors="replace") for token_id in ids]


def _json(value: dict[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json")
