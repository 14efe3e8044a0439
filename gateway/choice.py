"""One choice of an answer: tokens in, text out, and when it is over."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import BatonError, Cause
from baton.text import OutputText, Tokenizer
from baton.types import FinishReason, Logprobs, SamplingParams, TokenChunk

_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.REPETITION: "repetition",
}


@dataclass(slots=True)
class Delta:
    """What one choice gained. Over a choice, `text` concatenates to its whole text. Never changed,
    but not `frozen`, which takes three times as long for every token."""

    index: int  # of the choice, over all prompts, prompt-major
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    first: bool  # the choice's first
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # stop string or stop id; None for EOS and length


def joined(deltas: Sequence[Delta]) -> Delta:
    """Consecutive deltas of one choice as one."""
    first, last = deltas[0], deltas[-1]
    if first is last:
        return first
    return Delta(
        first.index,
        "".join(delta.text for delta in deltas),
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        first.first,
        last.finish_reason,
        last.stop_reason,
    )


class Choice:
    """Owns the text of one choice. Tokens behind a stop string are dropped and not counted."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.index = index
        self.finished = False
        self._text = OutputText(tokenizer, sampling)
        self._eos_token_ids = () if sampling.ignore_eos else eos_token_ids

    @property
    def num_tokens(self) -> int:
        return self._text.num_tokens

    @property
    def stopped_by_string(self) -> bool:
        return self._text.stop_string is not None

    def push(self, chunk: TokenChunk) -> Delta:
        """
        Raises:
            BatonError: INTERNAL, the chunk is not the next one.
        """
        before = self.num_tokens
        if chunk.start != before:
            raise BatonError(Cause.INTERNAL, f"got token {chunk.start}, expected {before}")
        text = self._text.push(chunk.token_ids, stop_token_id=chunk.stop_token_id)
        finish_reason: str | None = None
        stop_reason: str | int | None = None
        if chunk.finish_reason is not None and not self.stopped_by_string:
            text += self._text.finish()
            finish_reason = _FINISH_REASONS[chunk.finish_reason]
            if chunk.stop_token_id not in self._eos_token_ids:
                stop_reason = chunk.stop_token_id
        if self.stopped_by_string:
            finish_reason, stop_reason = "stop", self._text.stop_string
        self.finished = finish_reason is not None
        num_new = self.num_tokens - before
        return Delta(
            self.index,
            text,
            chunk.token_ids[:num_new],
            chunk.logprobs[:num_new],
            before == 0,
            finish_reason,
            stop_reason,
        )
