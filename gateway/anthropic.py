"""POST /v1/messages and /v1/messages/count_tokens: chats in Anthropic's shape."""

import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from baton.gateway.chat import begin, choice_message
from baton.gateway.chat_fields import ChatFields
from baton.gateway.choice import Delta
from baton.gateway.context import Context
from baton.gateway.fields import translated
from baton.gateway.generation import Generation, Usage
from baton.gateway.message_fields import CountTokensRequest, MessagesRequest
from baton.gateway.openai import ChatCompletionRequest
from baton.gateway.prompts import Truncation, render_prompt
from baton.gateway.stream import GenerationResponse, Streaming

PATH = "/v1/messages"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def messages_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["Anthropic"])

    @router.post(PATH, response_class=Response)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        chat = body.to_chat()
        generation = begin(context, chat, request, PATH, id_prefix="msg")
        how = Streaming(continuous_usage=True, named_events=True)
        return GenerationResponse(
            generation,
            MessageShape(context, chat, generation),
            context.limits,
            streaming=how if body.stream else None,
        )

    @router.post(f"{PATH}/count_tokens")
    async def count_tokens(body: CountTokensRequest) -> dict[str, int]:
        chat = translated(ChatFields, body.chat_fields(), {})
        model = context.find_generator(body.model)
        longest = max(model.max_model_len, context.limits.max_request_tokens)
        prompt = await render_prompt(context, chat, max_model_len=longest, truncation=Truncation())
        return {"input_tokens": len(prompt.token_ids)}

    return router


class MessageShape:
    """A `message`, and its events: blocks of content that open and close one after the other."""

    def __init__(
        self, context: Context, body: ChatCompletionRequest, generation: Generation
    ) -> None:
        self._settings = context.settings
        self._body = body
        self._generation = generation
        self._message = choice_message(context.settings, body, generation, 0)
        self._block: str | None = None  # type of the one that is open
        self._num_blocks = 0
        self._has_calls = False
        self._last: Delta | None = None

    # ── streamed ─────────────────────────────────────────────────────────────────────────────────

    def chunks(self, delta: Delta, usage: Usage | None) -> Sequence[dict[str, Any]]:
        assert usage is not None, "asked for"
        events: list[dict[str, Any]] = []
        if delta.first:
            self._message = choice_message(self._settings, self._body, self._generation, 0)
            message = self._head() | {"content": [], "stop_reason": None, "stop_sequence": None}
            start = Usage(usage.prompt_tokens, 0, usage.cached_tokens)
            events.append({"type": "message_start", "message": message | _usage(start)})
        for fields in self._message.push(delta):
            events += self._events_of(fields)
        self._last = delta
        return events

    def _events_of(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        if "content" in fields:
            block = {"type": "text", "text": ""}
            return self._grow(block, {"type": "text_delta", "text": fields["content"]})
        if "reasoning" in fields:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            return self._grow(block, {"type": "thinking_delta", "thinking": fields["reasoning"]})
        (call,) = fields["tool_calls"]
        function = call["function"]
        if "id" not in call:
            part = {"type": "input_json_delta", "partial_json": function["arguments"]}
            return [self._delta(part)]
        self._has_calls = True
        names = {"id": call["id"], "name": function["name"]}
        return [*self._close(), self._open({"type": "tool_use", **names, "input": {}})]

    def _grow(self, block: dict[str, Any], delta: dict[str, Any]) -> list[dict[str, Any]]:
        """Add to a block of that type; open one if another is open, or none."""
        if self._block == block["type"]:
            return [self._delta(delta)]
        return [*self._close(), self._open(block), self._delta(delta)]

    def _open(self, block: dict[str, Any]) -> dict[str, Any]:
        self._block = block["type"]
        self._num_blocks += 1
        index = self._num_blocks - 1
        return {"type": "content_block_start", "index": index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if self._block is None:
            return []
        self._block = None
        return [{"type": "content_block_stop", "index": self._num_blocks - 1}]

    def last_chunks(self, usage: Usage) -> Sequence[dict[str, Any]]:
        assert self._last is not None, "a stream that ends well has tokens"
        delta = self._stop(self._last)
        return (
            *self._close(),
            {"type": "message_delta", "delta": delta, **_usage(usage)},
            {"type": "message_stop"},
        )

    # ── whole ────────────────────────────────────────────────────────────────────────────────────

    def answer(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        message = choice_message(self._settings, self._body, self._generation, 0)
        self._message = message
        (deltas,) = choices
        for delta in deltas:
            message.push(delta)
        fields = message.message()
        calls = fields.get("tool_calls", [])
        self._has_calls = bool(calls)
        content: list[dict[str, Any]] = []
        if fields["reasoning"]:
            thinking = {"type": "thinking", "thinking": fields["reasoning"], "signature": ""}
            content.append(thinking)
        if fields["content"] or not (content or calls):
            content.append({"type": "text", "text": fields["content"] or ""})
        content += map(_tool_use, calls)
        return self._head() | {"content": content} | self._stop(deltas[-1]) | _usage(usage)

    def _head(self) -> dict[str, Any]:
        job = self._generation.job
        return {
            "id": job.public_id,
            "type": "message",
            "role": "assistant",
            "model": job.model.name,
        }

    def _stop(self, last: Delta) -> dict[str, Any]:
        reason = self._message.finish_reason(last.finish_reason)
        if self._has_calls and reason == "stop":
            reason = "tool_calls"
        if isinstance(last.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_reason}
        name = _STOP_REASONS.get(reason or "", "end_turn")
        return {"stop_reason": name, "stop_sequence": None}


def _tool_use(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:  # cut off by max_tokens
        arguments = {}
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "usage": {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        }
    }
