"""Log-probabilities in the two shapes that OpenAI has for them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from baton.gateway.choice import Delta
from baton.text import Tokenizer
from baton.types import Logprobs

_LOWEST = -9999.0  # what OpenAI and vLLM write for -inf, which JSON lacks


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST


class LogprobWriter:
    """`num_top`: alternatives that the client asked for. `as_ids`: tokens read "token_id:N".
    `with_ranks`: completions also have the rank of each token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_top: int,
        *,
        as_ids: bool = False,
        with_ranks: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_ids = as_ids
        self._with_ranks = with_ranks
        self._offsets: dict[int, int] = {}  # choice → characters of its tokens so far

    def _text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")

    def completion(self, delta: Delta) -> dict[str, Any]:
        """tokens, token_logprobs, top_logprobs, text_offset: a list entry per token."""
        return self._columns(delta.index, delta.token_ids, delta.logprobs)

    def echoed(
        self, delta: Delta, prompt: Sequence[int], scores: Sequence[Logprobs]
    ) -> dict[str, Any]:
        """The prompt's tokens (`scores`: of all but the first, which gets nulls), then the delta's
        own."""
        return self._columns(
            delta.index, (*prompt, *delta.token_ids), (None, *scores, *delta.logprobs)
        )

    def _columns(
        self, index: int, token_ids: Sequence[int], entries: Sequence[Logprobs | None]
    ) -> dict[str, Any]:
        tokens = [self._text(token_id) for token_id in token_ids]
        offsets: list[int] = []
        offset = self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        ranks = [entry and entry.rank for entry in entries] if self._with_ranks else None
        return {
            "tokens": tokens,
            "token_logprobs": [entry and _finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                entry and self._top_map(token, entry)
                for token, entry in zip(tokens, entries, strict=True)
            ],
            "text_offset": offsets,
            **({} if ranks is None else {"token_ranks": ranks}),
        }

    def _top_map(self, token: str, entry: Logprobs) -> dict[str, float]:
        """The alternatives and the sampled token; where two ids read the same, the likelier."""
        found: dict[str, float] = {}
        for token_id, logprob in self._others(entry):
            found.setdefault(self._text(token_id), _finite(logprob))
        found.setdefault(token, _finite(entry.logprob))
        return found

    def _others(self, entry: Logprobs) -> Iterator[tuple[int, float]]:
        """The most likely, then those asked for by id that are not among them."""
        top = entry.top[: self._num_top]
        known = {token_id for token_id, _ in top}
        yield from top
        yield from (pair for pair in entry.asked if pair[0] not in known)

    def prompt(
        self, token_ids: Sequence[int], scores: Sequence[Logprobs]
    ) -> list[dict[str, dict[str, Any]] | None]:
        """vLLM's `prompt_logprobs`: per prompt token, id → {logprob, rank, decoded_token}, the
        token itself first; null for the first token. `scores`: of all but the first."""
        entries: list[dict[str, dict[str, Any]] | None] = [None]
        for token_id, score in zip(token_ids[1:], scores, strict=True):
            found = {str(token_id): self._scored(token_id, score.logprob, score.rank)}
            for rank, (other, logprob) in enumerate(score.top[: self._num_top], 1):
                found.setdefault(str(other), self._scored(other, logprob, rank))
            entries.append(found)
        return entries

    def _scored(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = self._text(token_id)
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}

    def chat(self, delta: Delta) -> dict[str, Any]:
        """content: one {token, logprob, bytes, top_logprobs} per token."""
        pairs = zip(delta.token_ids, delta.logprobs, strict=True)
        content = [
            self._entry(token_id, entry.logprob)
            | {"top_logprobs": [self._entry(*other) for other in self._others(entry)]}
            for token_id, entry in pairs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {
            "token": self._text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }
