"""What the generation endpoints do alike: make the job, its response, and the common JSON."""

import re
import time
import uuid
from typing import Any

from fastapi import Request

import baton
from baton.errors import InvalidRequest
from baton.gateway.accounting import RequestRecord
from baton.gateway.backend import ServedModel
from baton.gateway.context import Context
from baton.gateway.fields import RequestFields
from baton.gateway.generation import Encode, Generation, Job, Usage
from baton.gateway.logprobs import LogprobWriter
from baton.gateway.stream import GenerationResponse, Shape, Streaming
from baton.hashing import join_salt
from baton.text import Tokenizer
from baton.types import SamplingParams

FINGERPRINT = f"baton-{baton.__version__}"
_UNSAFE_ID_CHARS = re.compile(r"[^A-Za-z0-9._:-]")
# Fields of vLLM's answers that have no meaning here; whole answers carry them as nulls.
NO_EXTRAS = {
    "service_tier": None,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "metrics": None,
}
NO_CHOICE_EXTRAS = {"routed_experts": None, "weight_versions": None}


def start(
    context: Context,
    request: Request,
    body: RequestFields,
    *,
    endpoint: str,
    id_prefix: str,
    prompt_param: str,
    encode: Encode,
) -> Generation:
    """
    Raises:
        InvalidRequest: the body breaks a rule; its token ids are checked later.
        BatonError: NO_WORKER.
    """
    body.check()
    model = context.find_generator(body.model)
    sampling = body.params(context.defaults)
    check_against_model(sampling, model, body.length_field)
    job = Job(
        id=f"{id_prefix}-{uuid.uuid4().hex}",
        public_id=public_id(id_prefix, body.request_id, request),
        model=model,
        sampling=sampling,
        encode=encode,
        prompt_param=prompt_param,
        salt=join_salt(b"", (body.cache_salt or "").encode()),
        priority=body.priority,
        structured_param=body.structured_param,
        beam_length_penalty=body.beam_length_penalty,
        wants_output=body.wants_output,
    )
    record = RequestRecord(
        context.metrics,
        endpoint,
        model.name,
        sampling,
        _logged_ids(job, request),
        context.begin_span(request.headers.get("traceparent"), endpoint),
    )
    return Generation(context, job, record)


def public_id(prefix: str, asked: str | None, request: Request) -> str:
    """The id in the answer: the client's own, from the body or X-Request-Id, if there is one."""
    suffix = _UNSAFE_ID_CHARS.sub("", asked or "") or request.state.request_id
    return f"{prefix}-{suffix}"


def _logged_ids(job: Job, request: Request) -> str:
    """What the client and whoever is before the gateway know it by, and what the workers do."""
    asked = request.state.request_id
    others = [job.id] if job.public_id.endswith(asked) else [asked, job.id]
    return f"{job.public_id} ({', '.join(others)})"


def check_against_model(sampling: SamplingParams, model: ServedModel, length_field: str) -> None:
    """
    Raises:
        InvalidRequest: the model is too short for it, or lacks a token id.
    """
    max_tokens, max_model_len = sampling.max_tokens, model.max_model_len
    if max_tokens is not None and max_tokens > max_model_len:
        raise InvalidRequest(
            f"{length_field} is {max_tokens}, but the model's length is {max_model_len} tokens.",
            length_field,
        )
    if any(not 0 <= token_id < model.vocab_size for token_id in sampling.stop_token_ids):
        raise InvalidRequest("stop_token_ids has an id out of the vocabulary.", "stop_token_ids")


def respond(
    context: Context, body: RequestFields, generation: Generation, shape: Shape
) -> GenerationResponse:
    options = body.stream_options
    streaming = Streaming(
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        interval=max(body.stream_interval or 1, context.settings.stream_interval),
    )
    return GenerationResponse(
        generation, shape, context.limits, streaming=streaming if body.stream else None
    )


def envelope(generation: Generation, kind: str) -> dict[str, Any]:
    """The fields that an answer, or every chunk of a stream, starts with."""
    return {
        "id": generation.job.public_id,
        "object": kind,
        "created": int(time.time()),  # for people; nothing is measured with it
        "model": generation.job.model.name,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, generation: Generation, number: int
) -> list[dict[str, dict[str, Any]] | None] | None:
    """Of the prompt with this number, if they were asked for."""
    wanted = generation.job.sampling.prompt_logprobs
    if wanted is None:
        return None
    token_ids = generation.prompts[number].token_ids
    return LogprobWriter(tokenizer, wanted).prompt(token_ids, generation.prompt_logprobs[number])


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
