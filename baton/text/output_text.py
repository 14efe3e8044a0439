"""The visible text of one choice: detokenizer and stop strings in one place."""

from collections.abc import Sequence

from baton.text.stop_strings import StopStringMatcher
from baton.text.tokenizer import Tokenizer
from baton.types import SamplingParams


class OutputText:
    """Turns one choice's tokens into text and says when a stop string ends it.

    Text of the first `min_tokens` tokens never stops and never takes part in a stop, as in vLLM.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._matcher = StopStringMatcher(
            params.stop, include_stop=params.include_stop_str_in_output
        )
        self._min_tokens = params.min_tokens
        self._show_stop_token = params.include_stop_str_in_output
        self.num_tokens = 0  # kept so far; surplus behind a stop string does not count

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the choice."""
        return self._matcher.stop

    def push(self, token_ids: Sequence[int], *, stop_token_id: int | None = None) -> str:
        """Text that these tokens make certain. Tokens behind the one that completes a stop string
        are ignored: `num_tokens` grows by those that count.

        `stop_token_id` says that the last of `token_ids` is the EOS or stop id that ended the
        choice; its text is shown only with `include_stop_str_in_output`.
        """
        hides_last = stop_token_id is not None and not self._show_stop_token
        if not self._matcher.has_stops:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids[:-1] if hides_last else token_ids)
        shown = []
        for index, token_id in enumerate(token_ids):
            if self.stop_string is not None:
                break
            self.num_tokens += 1
            if hides_last and index == len(token_ids) - 1:
                break
            text = self._detokenizer.push((token_id,))
            if self.num_tokens > self._min_tokens:
                text = self._matcher.push(text)
            shown.append(text)
        return "".join(shown)

    def finish(self) -> str:
        """The rest of the text once no more tokens will come."""
        if self.stop_string is not None:
            return ""
        tail = self._detokenizer.finish()
        shown = self._matcher.push(tail)
        return shown if self.stop_string is not None else shown + self._matcher.finish()
