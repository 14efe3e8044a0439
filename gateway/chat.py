"""POST /v1/chat/completions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from baton.errors import InvalidRequest
from baton.gateway.answers import (
    FINGERPRINT,
    NO_CHOICE_EXTRAS,
    NO_EXTRAS,
    envelope,
    prompt_logprobs,
    respond,
    start,
    usage_body,
)
from baton.gateway.backend import ServedModel
from baton.gateway.chat_message import ChoiceMessage, MessageStyle
from baton.gateway.choice import Delta, joined
from baton.gateway.context import Context
from baton.gateway.events import TextEvents
from baton.gateway.generation import Generation, Usage
from baton.gateway.logprobs import LogprobWriter
from baton.gateway.openai import ChatCompletionRequest
from baton.gateway.parsers.reasoning import REASONING_PARSERS
from baton.gateway.prompts import Prompt, Truncation, render_prompt
from baton.settings import GatewaySettings
from baton.text import message_text

PATH = "/v1/chat/completions"


def chat_router(context: Context, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, tags=["OpenAI"])

    @router.post(PATH, response_class=Response)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        return answer(context, body, request, PATH)

    return router


def answer(
    context: Context, body: ChatCompletionRequest, request: Request, endpoint: str
) -> Response:
    """
    Raises:
        BatonError: refused.
    """
    generation = begin(context, body, request, endpoint)
    return respond(context, body, generation, ChatShape(context, body, generation))


def begin(
    context: Context,
    body: ChatCompletionRequest,
    request: Request,
    endpoint: str,
    id_prefix: str = "chatcmpl",
    prompt_param: str = "messages",
) -> Generation:
    """
    Args:
        prompt_param: the field that `body.messages` come from.

    Raises:
        BatonError: refused.
    """
    settings = context.settings
    body.check_tools(auto=settings.enable_auto_tool_choice)

    async def encode(model: ServedModel) -> Sequence[Prompt]:
        truncation = Truncation.to_fit(body, model.max_model_len)
        length = model.max_model_len
        try:
            return [await render_prompt(context, body, max_model_len=length, truncation=truncation)]
        except InvalidRequest as error:
            param = prompt_param if error.param == "messages" else error.param
            raise InvalidRequest(error.message, param, error.cause) from None

    return start(
        context,
        request,
        body,
        endpoint=endpoint,
        id_prefix=id_prefix,
        prompt_param=prompt_param,
        encode=encode,
    )


def choice_message(
    settings: GatewaySettings, body: ChatCompletionRequest, generation: Generation, index: int
) -> ChoiceMessage:
    """For a choice whose first token is here: its prompt is known, and how that ends matters."""
    reasoning = None
    if settings.reasoning_parser is not None and generation.prompts:
        prompt = generation.prompt_of(index).text or ""
        reasoning = partial(REASONING_PARSERS[settings.reasoning_parser], prompt)
    parser = settings.tool_call_parser if settings.enable_auto_tool_choice else None
    return ChoiceMessage(MessageStyle.of(body, parser, reasoning))


class ChatShape:
    """`chat.completion` and its chunks; a choice's first chunk has the role and no content."""

    def __init__(
        self, context: Context, body: ChatCompletionRequest, generation: Generation
    ) -> None:
        self._chunk = envelope(generation, "chat.completion.chunk")
        self._whole = envelope(generation, "chat.completion")
        self._generation = generation
        self._tokenizer = context.tokenizers.tokenizer
        self._body = body
        self._settings = context.settings
        self._messages: dict[int, ChoiceMessage] = {}
        self._role = _role(body)
        self._echo = _echo(body, self._role)
        self._return_token_ids = body.return_token_ids
        self._return_prompt_text = body.return_prompt_text
        self._usage_chunk_follows = body.include_usage
        as_ids = body.return_tokens_as_token_ids
        self._logprobs = (
            LogprobWriter(
                self._tokenizer,
                body.top_logprobs,
                as_ids=context.settings.return_tokens_as_token_ids if as_ids is None else as_ids,
            )
            if body.logprobs
            else None
        )
        self._text_events = TextEvents(
            lambda index, text: self._bare_chunk(index, {"content": text}, None)
        )

    def chunks(self, delta: Delta, usage: Usage | None) -> Sequence[dict[str, Any] | bytes]:
        fields = self._message(delta.index).push(delta)
        says_more = self._logprobs or self._return_token_ids or delta.finish_reason is not None
        if not (delta.first or says_more) and usage is None and len(fields) == 1:
            text = fields[0].get("content")
            if text is not None:
                return (self._text_events.write(delta.index, text),)
        chunks = [*self._opening(delta.index, usage)] if delta.first else []
        chunks += [self._bare_chunk(delta.index, part, usage) for part in fields[:-1]]
        if fields or says_more:
            last = {**self._chunk, "choices": [self._choice_of(delta, fields[-1:])]}
            if delta.finish_reason is not None and not self._usage_chunk_follows:
                last["system_fingerprint"] = FINGERPRINT
            if usage is not None:
                last["usage"] = self._usage_body(usage)
            chunks.append(last)
        return chunks

    def _message(self, index: int) -> ChoiceMessage:
        message = self._messages.get(index)
        if message is None:
            message = choice_message(self._settings, self._body, self._generation, index)
            self._messages[index] = message
        return message

    def _usage_body(self, usage: Usage) -> dict[str, Any]:
        body = usage_body(usage)
        if self._settings.reasoning_parser is not None:
            num_tokens = sum(m.num_reasoning_tokens for m in self._messages.values())
            body["completion_tokens_details"] = {"reasoning_tokens": num_tokens}
        return body

    def _opening(self, index: int, usage: Usage | None) -> Sequence[dict[str, Any]]:
        """The role, and what is echoed."""
        first = self._bare_chunk(index, {"role": self._role, "content": ""}, usage)
        first.update(self._prompt_fields())
        if not self._echo:
            return (first,)
        return first, self._bare_chunk(index, {"content": self._echo}, usage)

    def _bare_chunk(self, index: int, delta: dict[str, Any], usage: Usage | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk: dict[str, Any] = {**self._chunk, "choices": [choice]}
        if usage is not None:
            chunk["usage"] = usage_body(Usage(usage.prompt_tokens, 0, usage.cached_tokens))
        return chunk

    def _choice_of(self, delta: Delta, fields: Sequence[dict[str, Any]]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": fields[0] if fields else {},
            "logprobs": self._logprobs.chat(delta) if self._logprobs else None,
            "finish_reason": self._message(delta.index).finish_reason(delta.finish_reason),
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def last_chunks(self, usage: Usage) -> Sequence[dict[str, Any]]:
        chunk = {
            **self._chunk,
            "choices": [],
            "usage": self._usage_body(usage),
            "system_fingerprint": FINGERPRINT,
        }
        return (chunk,)

    def answer(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        return {
            **self._whole,
            "choices": [self._whole_choice(deltas) for deltas in choices],
            "usage": self._usage_body(usage),
            "system_fingerprint": FINGERPRINT,
            **NO_EXTRAS,
            "prompt_logprobs": prompt_logprobs(self._tokenizer, self._generation, 0),
            "prompt_token_ids": None,
            "prompt_text": None,
            **self._prompt_fields(),
        }

    def _prompt_fields(self) -> dict[str, Any]:
        (prompt,) = self._generation.prompts
        fields: dict[str, Any] = {}
        if self._return_token_ids:
            fields["prompt_token_ids"] = list(prompt.token_ids)
        if self._return_prompt_text:
            fields["prompt_text"] = prompt.text
        return fields

    def _whole_choice(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        delta = joined(deltas)
        message = self._message(delta.index)
        for part in deltas:
            message.push(part)
        fields = message.message()
        if self._echo:
            fields["content"] = self._echo + (fields["content"] or "")
        return {
            "index": delta.index,
            "message": {
                "role": self._role,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                **fields,
            },
            "logprobs": self._logprobs.chat(delta) if self._logprobs else None,
            "finish_reason": message.finish_reason(delta.finish_reason),
            "stop_reason": delta.stop_reason,
            "token_ids": list(delta.token_ids) if self._return_token_ids else None,
            **NO_CHOICE_EXTRAS,
        }


def _role(body: ChatCompletionRequest) -> str:
    """Without a generation prompt, the model goes on as whoever spoke last."""
    last = body.messages[-1].get("role") if body.messages else None
    continues = body.continue_final_message or not body.add_generation_prompt
    return last if continues and isinstance(last, str) else "assistant"


def _echo(body: ChatCompletionRequest, role: str) -> str:
    """The last message's text, if the answer goes on in its role."""
    if not body.echo or not body.messages or body.messages[-1].get("role") != role:
        return ""
    return message_text(body.messages[-1])
