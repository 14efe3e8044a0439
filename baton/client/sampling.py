"""SamplingParams as fields of the HTTP API, and its answers as `baton.outputs`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from baton.errors import InvalidRequest
from baton.outputs import CompletionOutput, Logprob, RequestOutput
from baton.types import SamplingParams

_LOWEST = -9999.0  # what the API writes for -inf
# No fields of the API; `bad_words` are one, and become ids there.
_NOT_SENT = {"bad_words_token_ids", "processed_logprobs"}


def sampling_fields(params: SamplingParams, max_model_len: int) -> dict[str, Any]:
    """Every field, given or not, so that the server's defaults do not count.

    `max_tokens` None = as many as the model's length leaves, which the server works out.

    Raises:
        InvalidRequest: something that the API has no field for.
    """
    if params.bad_words_token_ids and not params.bad_words:
        raise InvalidRequest("give bad_words as texts", "bad_words_token_ids")
    if params.processed_logprobs:
        raise InvalidRequest("a fleet gives the model's own logprobs", "processed_logprobs")
    known = {field.name: getattr(params, field.name) for field in fields(params)}
    body = {name: value for name, value in known.items() if name not in _NOT_SENT}
    max_tokens = min(params.max_tokens or max_model_len, max_model_len)
    body["max_tokens"] = max_tokens
    body["min_tokens"] = min(params.min_tokens, max_tokens)
    body["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias}
    if params.repetition_detection is not None:
        body["repetition_detection"] = asdict(params.repetition_detection)
    if params.structured_outputs is not None:
        body["structured_outputs"] = params.structured_outputs.fields()
    return {name: value for name, value in body.items() if value is not None}


def default_params(rendered: Mapping[str, Any]) -> SamplingParams:
    """The server's defaults, from the `sampling_params` of a rendered request that gave none."""
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    )
    return SamplingParams(**{name: rendered[name] for name in names if name in rendered})


class AnswerReader:
    """One answer of /v1/completions that was asked for token ids."""

    def __init__(self, answer: Mapping[str, Any], params: SamplingParams) -> None:
        self._answer = answer
        self._params = params

    def token_ids(self) -> set[int]:
        """Whose texts `output` needs."""
        found: set[int] = set()
        for choice in self._answer["choices"]:
            logprobs = choice["logprobs"] or {"tokens": (), "top_logprobs": ()}
            found.update(choice["token_ids"] if choice["logprobs"] else ())
            for top in logprobs["top_logprobs"]:
                found.update(map(_token_id, top))
        return found

    def output(self, prompt: str | None, texts: Mapping[int, str]) -> RequestOutput:
        """`texts`: of the ids that `token_ids` gave."""
        choices = self._answer["choices"]
        usage = self._answer["usage"]
        return RequestOutput(
            request_id=self._answer["id"],
            prompt=prompt,
            prompt_token_ids=choices[0]["prompt_token_ids"],
            outputs=[self._choice(choice, texts) for choice in choices],
            finished=True,
            prompt_logprobs=_prompt_logprobs(choices[0]["prompt_logprobs"]),
            num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        )

    def _choice(self, choice: Mapping[str, Any], texts: Mapping[int, str]) -> CompletionOutput:
        logprobs = choice["logprobs"]
        token_logprobs = logprobs and [_logprob(value) for value in logprobs["token_logprobs"]]
        return CompletionOutput(
            index=choice["index"],
            text=choice["text"],
            token_ids=choice["token_ids"],
            cumulative_logprob=None if token_logprobs is None else sum(token_logprobs),
            logprobs=None
            if logprobs is None
            else [
                self._entry(token_id, value, rank, top, texts)
                for token_id, value, rank, top in zip(
                    choice["token_ids"],
                    token_logprobs,
                    logprobs["token_ranks"],
                    logprobs["top_logprobs"],
                    strict=True,
                )
            ],
            finish_reason=choice["finish_reason"],
            stop_reason=choice["stop_reason"],
        )

    def _entry(
        self,
        token_id: int,
        value: float,
        rank: int,
        top: Mapping[str, float],
        texts: Mapping[int, str],
    ) -> dict[int, Logprob]:
        """The token itself first, then the most likely, then those asked for by id."""
        entry = {token_id: Logprob(value, rank, texts[token_id])}
        for place, (name, other_value) in enumerate(top.items(), 1):
            other = _token_id(name)
            other_rank = place if place <= (self._params.logprobs or 0) else None
            entry.setdefault(other, Logprob(_logprob(other_value), other_rank, texts[other]))
        return entry


def cumulative_logprob(choice: Mapping[str, Any]) -> float:
    return sum(_logprob(value) for value in choice["logprobs"]["token_logprobs"])


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _logprob(value: float) -> float:
    return float("-inf") if value == _LOWEST else value


def _prompt_logprobs(
    entries: Sequence[Mapping[str, Mapping[str, Any]] | None] | None,
) -> list[dict[int, Logprob] | None] | None:
    if entries is None:
        return None
    return [None if entry is None else dict(map(_scored, entry.items())) for entry in entries]


def _scored(item: tuple[str, Mapping[str, Any]]) -> tuple[int, Logprob]:
    token_id, scored = item
    return int(token_id), Logprob(
        _logprob(scored["logprob"]), scored["rank"], scored["decoded_token"]
    )
