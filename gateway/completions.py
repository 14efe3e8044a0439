"""POST /v1/completions."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from baton.errors import InvalidRequest
from baton.gateway.answers import (
    FINGERPRINT,
    NO_CHOICE_EXTRAS,
    NO_EXTRAS,
    envelope,
    prompt_logprobs,
    respond,
    start,
    usage_body,
)
from baton.gateway.backend import ServedModel
from baton.gateway.choice import Delta, joined
from baton.gateway.context import Context
from baton.gateway.events import TextEvents
from baton.gateway.generation import Generation, Usage
from baton.gateway.logprobs import LogprobWriter
from baton.gateway.openai import CompletionRequest
from baton.gateway.prompts import Prompt, Truncation, encode_prompts, parse_prompts

PATH = "/v1/completions"


def completions_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["OpenAI"])

    @router.post(PATH, response_class=Response)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        return answer(context, body, request, PATH)

    return router


def answer(context: Context, body: CompletionRequest, request: Request, endpoint: str) -> Response:
    """
    Raises:
        BatonError: refused.
    """
    generation = begin(context, body, request, endpoint)
    return respond(context, body, generation, CompletionShape(context, body, generation))


def begin(context: Context, body: CompletionRequest, request: Request, endpoint: str) -> Generation:
    """
    Raises:
        BatonError: refused.
    """
    prompts = parse_prompts(body.prompt)
    max_choices = context.limits.max_choices
    if len(prompts) * body.n > max_choices:
        param = "n" if len(prompts) == 1 else "prompt"
        raise InvalidRequest(f"prompts × n must not exceed {max_choices}.", param)

    async def encode(model: ServedModel) -> Sequence[Prompt]:
        return await encode_prompts(
            context,
            prompts,
            add_special_tokens=body.add_special_tokens,
            max_model_len=model.max_model_len,
            truncation=Truncation.to_fit(body, model.max_model_len),
        )

    return start(
        context,
        request,
        body,
        endpoint=endpoint,
        id_prefix="cmpl",
        prompt_param="prompt",
        encode=encode,
    )


class CompletionShape:
    """Choices as OpenAI's `text_completion`; chunks have the same shape, less what is null."""

    def __init__(self, context: Context, body: CompletionRequest, generation: Generation) -> None:
        self._envelope = envelope(generation, "text_completion")
        self._generation = generation
        self._echo = body.echo
        self._tokenizer = context.tokenizers.tokenizer
        self._return_token_ids = body.return_token_ids
        self._usage_chunk_follows = body.include_usage
        as_ids = body.return_tokens_as_token_ids
        self._logprobs = (
            None
            if body.logprobs is None
            else LogprobWriter(
                self._tokenizer,
                body.logprobs,
                as_ids=context.settings.return_tokens_as_token_ids if as_ids is None else as_ids,
                with_ranks=body.return_token_ids,
            )
        )
        self._is_text_only = not (self._logprobs or self._return_token_ids or self._echo)
        self._text_events = TextEvents(self._text_chunk)

    def chunks(self, delta: Delta, usage: Usage | None) -> Sequence[dict[str, Any] | bytes]:
        if self._is_text_only and usage is None and delta.finish_reason is None:
            return (self._text_events.write(delta.index, delta.text),)
        chunk = {**self._envelope, "choices": [self._choice(delta)]}
        if delta.finish_reason is not None and not self._usage_chunk_follows:
            chunk["system_fingerprint"] = FINGERPRINT
        if usage is not None:
            chunk["usage"] = usage_body(usage)
        return (chunk,)

    def _text_chunk(self, index: int, text: str) -> dict[str, Any]:
        delta = Delta(index, text, (), (), first=False)
        return {**self._envelope, "choices": [self._choice(delta)]}

    def last_chunks(self, usage: Usage) -> Sequence[dict[str, Any]]:
        chunk = {
            **self._envelope,
            "choices": [],
            "usage": usage_body(usage),
            "system_fingerprint": FINGERPRINT,
        }
        return (chunk,)

    def answer(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        return {
            **self._envelope,
            "choices": [self._whole_choice(joined(deltas)) for deltas in choices],
            "usage": usage_body(usage),
            "system_fingerprint": FINGERPRINT,
            **NO_EXTRAS,
        }

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        number = delta.index // self._generation.job.sampling.n
        return {
            "token_ids": None,
            "prompt_token_ids": None,
            "prompt_logprobs": prompt_logprobs(self._tokenizer, self._generation, number),
            **NO_CHOICE_EXTRAS,
            **self._choice(delta),
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        prompt = self._generation.prompt_of(delta.index)
        echo = self._echo and delta.first
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": self._text_of(prompt) + delta.text if echo else delta.text,
            "logprobs": self._logprobs_of(delta, prompt if echo else None),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._return_token_ids:
            choice["token_ids"] = [*(prompt.token_ids if echo else ()), *delta.token_ids]
            if delta.first:
                choice["prompt_token_ids"] = list(prompt.token_ids)
        return choice

    def _logprobs_of(self, delta: Delta, echoed: Prompt | None) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        if echoed is None:
            return self._logprobs.completion(delta)
        scores = self._generation.scores_of(delta.index)
        return self._logprobs.echoed(delta, echoed.token_ids, scores)

    def _text_of(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        skip = self._generation.job.sampling.skip_special_tokens
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=skip)
