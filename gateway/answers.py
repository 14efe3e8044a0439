"""What both generation endpoints do alike: make the job, its response, and the common JSON."""

import time
import uuid
from typing import Any

from fastapi import Request

import baton
from baton.errors import Cause, InvalidRequest
from baton.gateway.accounting import RequestRecord
from baton.gateway.context import Context
from baton.gateway.generation import Generation, Job, Tokenize, Usage
from baton.gateway.openai import ChatCompletionRequest, CompletionRequest
from baton.gateway.stream import GenerationResponse, Shape
from baton.hashing import join_salt
from baton.types import SamplingParams

MAX_CHARS_PER_TOKEN = 256  # no vocabulary in use has a longer token
Body = CompletionRequest | ChatCompletionRequest


def start(
    context: Context,
    request: Request,
    body: Body,
    *,
    endpoint: str,
    id_prefix: str,
    prompt_param: str,
    tokenize: Tokenize,
) -> Generation:
    """
    Raises:
        InvalidRequest: the body breaks a rule; its token ids are checked later.
        BatonError: NO_WORKER.
    """
    body.check()
    model = context.find_model(body.model)
    sampling = body.sampling(context.tokenizers.tokenizer.sampling_defaults)
    _check_against_model(sampling, model.max_model_len, model.vocab_size, body)
    job = Job(
        id=f"{id_prefix}-{uuid.uuid4().hex}",
        model=model,
        sampling=sampling,
        tokenize=tokenize,
        prompt_param=prompt_param,
        salt=join_salt(b"", (body.cache_salt or "").encode()),
        priority=body.priority,
        skip_special_tokens=body.skip_special_tokens,
    )
    record = RequestRecord(context.metrics, endpoint, job.id, request.state.request_id)
    return Generation(context, job, record)


def _check_against_model(
    sampling: SamplingParams, max_model_len: int, vocab_size: int, body: Body
) -> None:
    max_tokens = sampling.max_tokens
    if max_tokens is not None and max_tokens > max_model_len:
        renamed = getattr(body, "max_completion_tokens", None) is not None
        name = "max_completion_tokens" if renamed else "max_tokens"
        raise InvalidRequest(
            f"{name} is {max_tokens}, but the model's length is {max_model_len} tokens.", name
        )
    if any(not 0 <= token_id < vocab_size for token_id in sampling.stop_token_ids):
        raise InvalidRequest("stop_token_ids has an id out of the vocabulary.", "stop_token_ids")


def check_num_chars(num_chars: int, max_model_len: int, param: str) -> None:
    """Refuse a text that cannot fit, before the time to tokenize it is spent."""
    if num_chars > max_model_len * MAX_CHARS_PER_TOKEN:
        raise InvalidRequest(
            f"The prompt has {num_chars} characters, more than {max_model_len} tokens can hold.",
            param,
            Cause.CONTEXT_LENGTH_EXCEEDED,
        )


def respond(
    context: Context, body: Body, generation: Generation, shape: Shape
) -> GenerationResponse:
    options = body.stream_options
    return GenerationResponse(
        generation,
        shape,
        context.limits,
        stream=body.stream,
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
    )


def envelope(generation: Generation, kind: str) -> dict[str, Any]:
    """The fields that an answer, or every chunk of a stream, starts with."""
    return {
        "id": generation.job.id,
        "object": kind,
        "created": int(time.time()),  # for people; nothing is measured with it
        "model": generation.job.model.name,
        "system_fingerprint": f"baton-{baton.__version__}",
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
