"""A response out of a generation: what `baton.gateway.stream.Shape` asks for, and failures."""

from collections.abc import Sequence
from typing import Any

from baton.gateway.chat import choice_message
from baton.gateway.choice import Delta
from baton.gateway.context import Context
from baton.gateway.errors import ApiError
from baton.gateway.generation import Generation, Usage
from baton.gateway.logprobs import LogprobWriter
from baton.gateway.responses.events import Event, ResponseWriter
from baton.gateway.responses.fields import ResponsesChat, ResponsesRequest, echoed

_LOST_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


class ResponsesShape:
    def __init__(
        self,
        context: Context,
        body: ResponsesRequest,
        chat: ResponsesChat,
        generation: Generation,
        *,
        store: bool,
    ) -> None:
        self.id = f"resp_{generation.job.id.rpartition('-')[2]}"
        repeated = echoed(body, generation.job.model.name, generation.job.sampling)
        self.writer = ResponseWriter(self.id, repeated, store=store)
        self._chat = chat
        self._generation = generation
        self._settings = context.settings
        self._message = choice_message(context.settings, chat, generation, 0)
        self._logprobs = (
            LogprobWriter(context.tokenizers.tokenizer, body.top_logprobs)
            if body.wants_logprobs
            else None
        )
        self._held_logprobs: list[Any] = []  # of content that the parsers hold back
        self._is_cut = False

    @property
    def response(self) -> dict[str, Any]:
        return self.writer.response

    def chunks(self, delta: Delta, usage: Usage | None) -> Sequence[Event]:
        events: list[Event] = []
        if delta.first:
            # How the prompt ends is known now, and matters to the parsers.
            self._message = choice_message(self._settings, self._chat, self._generation, 0)
            events += self.writer.started()
        self._is_cut = delta.finish_reason == "length"
        parts = self._message.push(delta)
        if self._logprobs is not None:
            self._held_logprobs += self._logprobs.chat(delta)["content"]
        for part in parts:
            logprobs: list[Any] = []
            if "content" in part:
                logprobs, self._held_logprobs = self._held_logprobs, []
            events += self.writer.push(part, logprobs)
        if parts and "content" not in parts[-1]:
            self._held_logprobs = []  # of reasoning and calls, which have none
        return events

    def last_chunks(self, usage: Usage) -> Sequence[Event]:
        return self.writer.ended(usage, self._message.num_reasoning_tokens, cut=self._is_cut)

    def answer(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        for delta in choices[0]:
            self.chunks(delta, None)
        self.last_chunks(usage)
        return self.response

    def cancelled(self, usage: Usage) -> list[Event]:
        return self.writer.cancelled(usage, self._message.num_reasoning_tokens)

    def failure(self, error: ApiError) -> Sequence[Event]:
        code = _LOST_CODES.get(error.status, "server_error")
        return self.writer.failed(code, error.body()["error"]["message"])
