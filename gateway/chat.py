"""POST /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from baton.gateway.answers import check_num_chars, envelope, respond, start, usage_body
from baton.gateway.backend import ServedModel
from baton.gateway.choice import Delta
from baton.gateway.context import Context
from baton.gateway.generation import Generation, TokenIds, Usage
from baton.gateway.logprobs import LogprobWriter, joined
from baton.gateway.openai import ChatCompletionRequest

PATH = "/v1/chat/completions"


def chat_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["OpenAI"])

    @router.post(PATH, response_class=Response)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        async def tokenize(model: ServedModel) -> Sequence[TokenIds]:
            return (await _token_ids(context, body, model),)

        generation = start(
            context,
            request,
            body,
            endpoint=PATH,
            id_prefix="chatcmpl",
            prompt_param="messages",
            tokenize=tokenize,
        )
        return respond(context, body, generation, ChatShape(context, body, generation))

    return router


async def _token_ids(context: Context, body: ChatCompletionRequest, model: ServedModel) -> TokenIds:
    """
    Raises:
        InvalidRequest: the messages are malformed, refused by the template, or far too long.
    """
    text = await context.tokenizers.render_chat(body.messages, **body.template_options())
    check_num_chars(len(text), model.max_model_len, "messages")
    ids = await context.tokenizers.encode(text, add_special_tokens=body.add_special_tokens)
    return tuple(ids)


class ChatShape:
    """`chat.completion` and its chunks; a choice's first chunk has the role and no content."""

    def __init__(
        self, context: Context, body: ChatCompletionRequest, generation: Generation
    ) -> None:
        self._chunk = envelope(generation, "chat.completion.chunk")
        self._whole = envelope(generation, "chat.completion")
        self._generation = generation
        self._return_token_ids = body.return_token_ids
        self._logprobs = (
            LogprobWriter(context.tokenizers.tokenizer, body.top_logprobs)
            if body.logprobs
            else None
        )

    def chunks(self, delta: Delta, usage: Usage | None) -> Sequence[dict[str, Any]]:
        chunk = {**self._chunk, "choices": [self._choice_of(delta)]}
        if usage is not None:
            chunk["usage"] = usage_body(usage)
        return (self._role_chunk(delta.index, usage), chunk) if delta.first else (chunk,)

    def _role_chunk(self, index: int, usage: Usage | None) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk: dict[str, Any] = {**self._chunk, "choices": [choice]}
        if usage is not None:
            chunk["usage"] = usage_body(Usage(usage.prompt_tokens, 0, usage.cached_tokens))
        if self._return_token_ids:
            chunk["prompt_token_ids"] = list(self._generation.prompts[0])
        return chunk

    def _choice_of(self, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs.chat(delta) if self._logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        return self._finish(choice, (delta,))

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk, "choices": [], "usage": usage_body(usage)}

    def answer(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        whole = {
            **self._whole,
            "choices": [self._message_of(deltas) for deltas in choices],
            "usage": usage_body(usage),
        }
        if self._return_token_ids:
            whole["prompt_token_ids"] = list(self._generation.prompts[0])
        return whole

    def _message_of(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        logprobs = self._logprobs
        choice: dict[str, Any] = {
            "index": deltas[0].index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": joined([logprobs.chat(delta) for delta in deltas]) if logprobs else None,
            "finish_reason": deltas[-1].finish_reason,
        }
        return self._finish(choice, deltas)

    def _finish(self, choice: dict[str, Any], deltas: Sequence[Delta]) -> dict[str, Any]:
        if deltas[-1].finish_reason is not None:
            choice["stop_reason"] = deltas[-1].stop_reason
        if self._return_token_ids:
            choice["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
        return choice
