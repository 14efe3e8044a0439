"""Log-probabilities in the two shapes that OpenAI has for them."""

import math
from typing import Any

from baton.gateway.choice import Delta
from baton.text import Tokenizer
from baton.types import Logprobs

_LOWEST = -9999.0  # what OpenAI and vLLM write for -inf, which JSON lacks


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST


class LogprobWriter:
    """`num_top`: alternatives that the client asked for. `as_ids`: tokens read "token_id:N"."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_ids = as_ids
        self._offsets: dict[int, int] = {}  # choice → characters of its tokens so far

    def _text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")

    def completion(self, delta: Delta) -> dict[str, Any]:
        """tokens, token_logprobs, top_logprobs, text_offset: a list entry per token."""
        tokens = [self._text(token_id) for token_id in delta.token_ids]
        offsets: list[int] = []
        offset = self._offsets.get(delta.index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[delta.index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in delta.logprobs],
            "top_logprobs": [
                self._top_map(token, entry)
                for token, entry in zip(tokens, delta.logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top_map(self, token: str, entry: Logprobs) -> dict[str, float]:
        """The alternatives and the sampled token; where two ids read the same, the likelier."""
        found: dict[str, float] = {}
        for token_id, logprob in entry.top[: self._num_top]:
            found.setdefault(self._text(token_id), _finite(logprob))
        found.setdefault(token, _finite(entry.logprob))
        return found

    def chat(self, delta: Delta) -> dict[str, Any]:
        """content: one {token, logprob, bytes, top_logprobs} per token."""
        pairs = zip(delta.token_ids, delta.logprobs, strict=True)
        content = [
            self._entry(token_id, entry.logprob)
            | {"top_logprobs": [self._entry(*top) for top in entry.top[: self._num_top]]}
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
