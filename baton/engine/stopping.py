"""When a choice has enough tokens. Stop *strings* are the gateway's."""

from collections.abc import Collection, Sequence

from baton.types import FinishReason, RepetitionDetection, SamplingParams

Finish = tuple[FinishReason | None, int | None]  # why it ends, if it does, and the stop id
GO_ON: Finish = (None, None)


def check_stop(
    params: SamplingParams,
    eos_token_ids: Collection[int],
    output: Sequence[int],
    num_prompt_tokens: int,
    max_model_len: int,
) -> Finish:
    """Whether a choice ends with the last token of `output`. A stop id wins over the length, and
    that over a repetition, when several apply."""
    token_id, num_output = output[-1], len(output)
    if token_id in eos_token_ids and params.structured_outputs is not None:
        return FinishReason.STOP, token_id  # a grammar lets EOS pass only at its end
    if num_output > params.min_tokens and (
        token_id in params.stop_token_ids or (not params.ignore_eos and token_id in eos_token_ids)
    ):
        return FinishReason.STOP, token_id
    if num_prompt_tokens + num_output >= max_model_len:
        return FinishReason.LENGTH, None
    if params.max_tokens is not None and num_output >= params.max_tokens:
        return FinishReason.LENGTH, None
    detection = params.repetition_detection
    if detection is not None and num_output >= params.min_tokens and repeats(output, detection):
        return FinishReason.REPETITION, None
    return GO_ON


def repeats(output: Sequence[int], detection: RepetitionDetection) -> bool:
    """Whether `output` ends in `min_count` copies of one pattern of an allowed size."""
    for size in range(max(detection.min_pattern_size, 1), detection.max_pattern_size + 1):
        num_tokens = size * detection.min_count
        if num_tokens > len(output):
            return False
        start = len(output) - num_tokens
        if all(output[i] == output[i + size] for i in range(len(output) - size - 1, start - 1, -1)):
            return True
    return False
