"""One streamed request, measured where its user is."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from baton.client.api import ApiClient, ApiError


@dataclass(slots=True)
class Outcome:
    """Times in seconds. Lengths in tokens, as the server counts them."""

    input_len: int  # what was meant to be sent, until the server has counted
    start: float = 0.0  # time.perf_counter() when the request was sent
    ttft: float = 0.0  # from then to the first chunk with output
    latency: float = 0.0  # from then to the last chunk with output
    itl: list[float] = field(default_factory=list)  # between chunks with output
    output_len: int = 0
    text: str = ""
    error: str = ""  # what the server said, or how the connection ended
    kind: str = ""  # what failures are counted by

    @property
    def ok(self) -> bool:
        return not self.kind

    @property
    def tpot(self) -> float | None:
        """Mean time between tokens; None: there is one token, or none."""
        if self.output_len < 2:
            return None
        return (self.latency - self.ttft) / (self.output_len - 1)

    def fail(self, kind: str, error: str) -> None:
        self.kind, self.error = kind, error


async def measure(
    client: ApiClient, path: str, body: Mapping[str, Any], input_len: int, *, keep_text: bool
) -> Outcome:
    """Never raises ApiError: a request that fails is an outcome too."""
    outcome = Outcome(input_len, start=time.perf_counter())
    last: float | None = None
    usage: Mapping[str, Any] | None = None
    num_ids = 0
    try:
        async for at, data in client.events(path, body):
            chunk = json.loads(data)
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or ():
                if not _has_output(choice):
                    continue
                if last is None:
                    outcome.ttft = at - outcome.start
                else:
                    outcome.itl.append(at - last)
                last = at
                num_ids += len(choice.get("token_ids") or ())
                if keep_text:
                    outcome.text += _text(choice)
    except ApiError as error:
        outcome.fail(error.kind, error.message)
    except (ValueError, AttributeError, TypeError) as error:
        outcome.fail("malformed chunk", str(error))
    if last is not None:
        outcome.latency = last - outcome.start
    _count(outcome, usage, num_ids, last is not None)
    return outcome


def _count(
    outcome: Outcome, usage: Mapping[str, Any] | None, num_ids: int, has_output: bool
) -> None:
    """Tokens are the server's count, or the ids that came; texts are never tokenized again."""
    if usage is not None:
        outcome.output_len = usage["completion_tokens"]
        outcome.input_len = usage["prompt_tokens"]
    else:
        outcome.output_len = num_ids
    if not outcome.ok:
        return
    if not has_output:
        outcome.fail("no output", "the stream had no output")
    elif outcome.output_len == 0:
        outcome.fail("no usage", "the stream says neither usage nor token ids")


def _has_output(choice: Mapping[str, Any]) -> bool:
    """A chat's first chunk may only say whose turn it is."""
    delta = choice.get("delta")
    if delta is None:
        return True
    names = ("content", "reasoning", "reasoning_content", "tool_calls")
    return bool(choice.get("finish_reason")) or any(delta.get(name) for name in names)


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta")
    return (choice.get("text") if delta is None else delta.get("content")) or ""
