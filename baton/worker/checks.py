"""What a worker refuses before its engine sees it. The engine's own door (token ids, blocks that
will never be there) comes after this one."""

from baton.errors import Cause, InvalidRequest
from baton.types import Request, WorkerInfo


def check_request(request: Request, info: WorkerInfo) -> None:
    """
    Raises:
        InvalidRequest: the request contradicts itself or exceeds the model's length.
    """
    sampling = request.sampling
    if sampling.seed is None or sampling.max_tokens is None:
        raise InvalidRequest("seed and max_tokens are resolved by the gateway", "seed")
    if request.output_token_ids and len(request.output_token_ids) != sampling.n:
        raise InvalidRequest("committed output must cover every choice", "n")
    if not request.finished_choices <= frozenset(range(sampling.n)):
        raise InvalidRequest("a finished choice does not exist", "n")
    if len(request.finished_choices) == sampling.n:
        raise InvalidRequest("every choice is finished", "n")
    num_tokens = len(request.prompt_token_ids) + sampling.max_tokens
    if num_tokens > info.max_model_len:
        raise InvalidRequest(
            f"prompt and max_tokens make {num_tokens} tokens; the limit is {info.max_model_len}",
            "max_tokens",
            Cause.CONTEXT_LENGTH_EXCEEDED,
        )
