"""Tokens in, tokens out: POST /inference/v1/generate takes ids and gives ids, and the render routes
say what a completion or a chat would send there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import Field

from baton.gateway import chat, completions
from baton.gateway.answers import prompt_logprobs, respond, start, usage_body
from baton.gateway.backend import ServedModel
from baton.gateway.choice import Delta, joined
from baton.gateway.context import Context
from baton.gateway.defaults import SamplingDefaults
from baton.gateway.fields import Int, RequestFields, TokenIds
from baton.gateway.generation import Generation, Usage
from baton.gateway.logprobs import LogprobWriter
from baton.gateway.openai import ChatCompletionRequest, CompletionRequest, GenerationBody
from baton.gateway.prompts import Prompt
from baton.gateway.sampling_fields import SamplingFields
from baton.types import Request as WorkerRequest
from baton.types import SamplingParams

PATH = "/inference/v1/generate"
_PREFIX = "gen"


class TokenSampling(SamplingFields):
    """vLLM's SamplingParams."""

    max_tokens: Int | None = 16
    logprobs: Int | None = Field(None, description="0..20 alternatives for each token")


class GenerateRequest(RequestFields):
    token_ids: TokenIds
    sampling_params: TokenSampling = Field(default_factory=lambda: TokenSampling.model_validate({}))

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        fields = self.sampling_params
        return fields.sampling(defaults, max_tokens=fields.max_tokens, logprobs=fields.logprobs)

    @property
    def asks_prompt_logprobs(self) -> bool:
        return self.sampling_params.asks_prompt_logprobs

    @property
    def beam_length_penalty(self) -> float | None:
        return self.sampling_params.beam_length_penalty


def token_io_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["Tokens"])

    @router.post(PATH, response_class=Response)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        async def encode(_: ServedModel) -> Sequence[Prompt]:
            return (Prompt(tuple(body.token_ids)),)

        generation = start(
            context,
            request,
            body,
            endpoint=PATH,
            id_prefix=_PREFIX,
            prompt_param="token_ids",
            encode=encode,
        )
        return respond(context, body, generation, TokenShape(context, body, generation))

    @router.post(completions.PATH + "/render", response_class=Response)
    async def render_completion(body: CompletionRequest, request: Request) -> Response:
        path = completions.PATH + "/render"
        generation = completions.begin(context, body, request, path)
        return JSONResponse(await _rendered(generation, body))

    @router.post(chat.PATH + "/render", response_class=Response)
    async def render_chat(body: ChatCompletionRequest, request: Request) -> Response:
        generation = chat.begin(context, body, request, chat.PATH + "/render")
        (rendered,) = await _rendered(generation, body)
        return JSONResponse(rendered)

    return router


async def _rendered(generation: Generation, body: GenerationBody) -> list[dict[str, Any]]:
    """A `GenerateRequest` for each prompt. Raises what the endpoint itself would."""
    try:
        requests = await generation.prepare()
    finally:
        generation.close()
    generation.record.outcome = "ok"
    options = None if body.stream_options is None else body.stream_options.model_dump()
    return [
        {
            "request_id": f"{generation.job.public_id}-{number}",
            "token_ids": list(request.prompt_token_ids),
            "sampling_params": sampling_body(request),
            "model": generation.job.model.name,
            "stream": body.stream,
            "stream_options": options,
            "cache_salt": body.cache_salt,
            "priority": body.priority,
        }
        for number, request in enumerate(requests)
    ]


def sampling_body(request: WorkerRequest) -> Mapping[str, Any]:
    """`TokenSampling` of what was resolved: seed, length and defaults are what they are here."""
    known = TokenSampling.model_fields.keys()
    sampling = request.sampling
    fields = {name: value for name, value in asdict(sampling).items() if name in known}
    fields["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias}
    if sampling.structured_outputs is not None:
        fields["structured_outputs"] = sampling.structured_outputs.fields()
    return fields


class TokenShape:
    """vLLM's GenerateResponse, and its chunks."""

    def __init__(self, context: Context, body: GenerateRequest, generation: Generation) -> None:
        self._request_id = generation.job.public_id.removeprefix(f"{_PREFIX}-")
        self._generation = generation
        self._tokenizer = context.tokenizers.tokenizer
        wanted = body.sampling_params.logprobs
        self._logprobs = None if wanted is None else LogprobWriter(self._tokenizer, wanted)

    def chunks(self, delta: Delta, usage: Usage | None) -> Sequence[dict[str, Any]]:
        chunk: dict[str, Any] = {"request_id": self._request_id, "choices": [self._choice(delta)]}
        if usage is not None:
            chunk["usage"] = usage_body(usage)
        return (chunk,)

    def last_chunks(self, usage: Usage) -> Sequence[dict[str, Any]]:
        return ({"request_id": self._request_id, "choices": [], "usage": usage_body(usage)},)

    def answer(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        return {
            "request_id": self._request_id,
            "choices": [self._choice(joined(deltas)) for deltas in choices],
            "usage": usage_body(usage),
            "prompt_logprobs": prompt_logprobs(self._tokenizer, self._generation, 0),
            "kv_transfer_params": None,
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "logprobs": self._logprobs.chat(delta) if self._logprobs else None,
            "finish_reason": delta.finish_reason,
            "token_ids": list(delta.token_ids),
        }
