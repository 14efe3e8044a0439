"""When a choice has enough tokens. Stop *strings* are the gateway's."""

from collections.abc import Collection

from baton.types import FinishReason, SamplingParams

Finish = tuple[FinishReason | None, int | None]  # why it ends, if it does, and the stop id
GO_ON: Finish = (None, None)


def check_stop(
    params: SamplingParams,
    eos_token_ids: Collection[int],
    token_id: int,
    num_output_tokens: int,
    num_tokens: int,
    max_model_len: int,
) -> Finish:
    """Whether a choice ends with `token_id`, its newest, already counted in `num_output_tokens` and
    `num_tokens` (prompt + output). A stop id wins over the length when both apply."""
    if num_output_tokens > params.min_tokens and (
        token_id in params.stop_token_ids or (not params.ignore_eos and token_id in eos_token_ids)
    ):
        return FinishReason.STOP, token_id
    if num_tokens >= max_model_len:
        return FinishReason.LENGTH, None
    if params.max_tokens is not None and num_output_tokens >= params.max_tokens:
        return FinishReason.LENGTH, None
    return GO_ON
