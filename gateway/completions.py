"""POST /v1/completions."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from baton.errors import InvalidRequest
from baton.gateway.answers import check_num_chars, envelope, respond, start, usage_body
from baton.gateway.backend import ServedModel
from baton.gateway.choice import Delta
from baton.gateway.context import Context
from baton.gateway.generation import Generation, TokenIds, Usage
from baton.gateway.logprobs import LogprobWriter, joined
from baton.gateway.openai import CompletionRequest

PATH = "/v1/completions"
MAX_CHOICES = 128  # prompts × n


def completions_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["OpenAI"])

    @router.post(PATH, response_class=Response)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        prompts = parse_prompts(body.prompt)
        if len(prompts) * body.n > MAX_CHOICES:
            raise InvalidRequest(f"prompts × n must not exceed {MAX_CHOICES}.", "prompt")

        async def tokenize(model: ServedModel) -> Sequence[TokenIds]:
            return await asyncio.gather(*(_token_ids(context, body, model, p) for p in prompts))

        generation = start(
            context,
            request,
            body,
            endpoint=PATH,
            id_prefix="cmpl",
            prompt_param="prompt",
            tokenize=tokenize,
        )
        return respond(context, body, generation, CompletionShape(context, body, generation))

    return router


def parse_prompts(prompt: object) -> list[str | TokenIds]:
    """A text, a list of texts, a list of ids or a list of id lists → one entry per prompt.

    Raises:
        InvalidRequest: none of these, or one that is empty.
    """
    if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
        return [_parse_prompt(item) for item in prompt]
    return [_parse_prompt(prompt)]


def _parse_prompt(prompt: object) -> str | TokenIds:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and set(map(type, prompt)) == {int}:  # bool is none
        return tuple(prompt)
    raise InvalidRequest(
        "prompt must be a text, a list of texts, a list of token ids or a list of such lists, and "
        "not empty.",
        "prompt",
    )


async def _token_ids(
    context: Context, body: CompletionRequest, model: ServedModel, prompt: str | TokenIds
) -> TokenIds:
    if not isinstance(prompt, str):
        return prompt
    check_num_chars(len(prompt), model.max_model_len, "prompt")
    ids = await context.tokenizers.encode(prompt, add_special_tokens=body.add_special_tokens)
    return tuple(ids)


class CompletionShape:
    """Choices as OpenAI's `text_completion`; chunks have the same shape as the whole."""

    def __init__(self, context: Context, body: CompletionRequest, generation: Generation) -> None:
        self._envelope = envelope(generation, "text_completion")
        self._generation = generation
        self._n = generation.job.sampling.n
        self._return_token_ids = body.return_token_ids
        self._logprobs = (
            None
            if body.logprobs is None
            else LogprobWriter(context.tokenizers.tokenizer, body.logprobs)
        )

    def chunks(self, delta: Delta, usage: Usage | None) -> Sequence[dict[str, Any]]:
        chunk = {**self._envelope, "choices": [self._choice([delta])]}
        if usage is not None:
            chunk["usage"] = usage_body(usage)
        return (chunk,)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._envelope, "choices": [], "usage": usage_body(usage)}

    def answer(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        return {
            **self._envelope,
            "choices": [self._choice(deltas) for deltas in choices],
            "usage": usage_body(usage),
        }

    def _choice(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Consecutive deltas of one choice as one object."""
        first, last = deltas[0], deltas[-1]
        choice: dict[str, Any] = {
            "index": first.index,
            "text": "".join(delta.text for delta in deltas),
            "logprobs": None,
            "finish_reason": last.finish_reason,
        }
        if self._logprobs is not None:
            choice["logprobs"] = joined([self._logprobs.completion(delta) for delta in deltas])
        if last.finish_reason is not None:
            choice["stop_reason"] = last.stop_reason
        if self._return_token_ids:
            choice["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
            if first.first:
                prompt = self._generation.prompts[first.index // self._n]
                choice["prompt_token_ids"] = list(prompt)
        return choice
