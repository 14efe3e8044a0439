"""SamplingParams to and from protobuf. See `baton.wire`, which is what everybody imports."""

from baton.errors import InvalidRequest
from baton.types import RepetitionDetection, SamplingParams, StructuredKind, StructuredOutput
from baton.v1 import common_pb2 as pb
from baton.wire_checks import MAX_TOKENS, check_len, refuse


def sampling_to_pb(params: SamplingParams) -> pb.SamplingParams:
    """
    Raises:
        ValueError: seed or max_tokens is missing; both are resolved before a request leaves its
            gateway.
    """
    if params.seed is None or params.max_tokens is None:
        raise ValueError("seed and max_tokens must be set before a request is sent")
    return pb.SamplingParams(
        n=params.n,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        processed_logprobs=params.processed_logprobs,
        logit_bias=[pb.LogitBias(token_id=i, bias=bias) for i, bias in params.logit_bias],
        allowed_token_ids=params.allowed_token_ids or (),
        bad_words=[pb.TokenIds(token_ids=ids) for ids in params.bad_words_token_ids],
        prompt_logprobs=params.prompt_logprobs,
        logprob_token_ids=params.logprob_token_ids,
        repetition_detection=_repetition_to_pb(params.repetition_detection),
        structured_outputs=_structured_to_pb(params.structured_outputs),
    )


def sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_len(getattr(message, field), MAX_TOKENS, field)
    try:
        return SamplingParams(
            n=message.n,
            temperature=message.temperature,
            top_p=message.top_p,
            top_k=message.top_k,
            min_p=message.min_p,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            repetition_penalty=message.repetition_penalty,
            seed=message.seed,
            max_tokens=message.max_tokens,
            min_tokens=message.min_tokens,
            ignore_eos=message.ignore_eos,
            stop_token_ids=tuple(message.stop_token_ids),
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            processed_logprobs=message.processed_logprobs,
            logit_bias=tuple((item.token_id, item.bias) for item in message.logit_bias),
            allowed_token_ids=tuple(message.allowed_token_ids) or None,
            bad_words_token_ids=tuple(tuple(item.token_ids) for item in message.bad_words),
            prompt_logprobs=(
                message.prompt_logprobs if message.HasField("prompt_logprobs") else None
            ),
            logprob_token_ids=tuple(message.logprob_token_ids),
            repetition_detection=_repetition_from_pb(message),
            structured_outputs=_structured_from_pb(message),
        )
    except InvalidRequest as error:
        raise refuse(error.message) from error


def _repetition_to_pb(detection: RepetitionDetection | None) -> pb.RepetitionDetection | None:
    if detection is None:
        return None
    return pb.RepetitionDetection(
        max_pattern_size=detection.max_pattern_size,
        min_pattern_size=detection.min_pattern_size,
        min_count=detection.min_count,
    )


def _repetition_from_pb(message: pb.SamplingParams) -> RepetitionDetection | None:
    if not message.HasField("repetition_detection"):
        return None
    detection = message.repetition_detection
    return RepetitionDetection(
        detection.max_pattern_size, detection.min_pattern_size, detection.min_count
    )


def _structured_to_pb(spec: StructuredOutput | None) -> pb.StructuredOutput | None:
    if spec is None:
        return None
    return pb.StructuredOutput(
        kind=int(spec.kind),  # type: ignore[arg-type]
        text=spec.text,
        compact=not spec.any_whitespace,
    )


def _structured_from_pb(message: pb.SamplingParams) -> StructuredOutput | None:
    if not message.HasField("structured_outputs"):
        return None
    spec = message.structured_outputs
    try:
        kind = StructuredKind(spec.kind)
    except ValueError:
        raise refuse(f"structured output of kind {spec.kind}") from None
    return StructuredOutput(kind, spec.text, not spec.compact)
