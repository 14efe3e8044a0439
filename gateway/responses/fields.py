"""The body of /v1/responses, and the chat request that it amounts to."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from baton.errors import Cause, InvalidRequest
from baton.gateway.fields import (
    Bool,
    Fields,
    Float,
    Int,
    NonEmpty,
    Objects,
    StopStrings,
    Text,
    TokenIds,
    translated,
)
from baton.gateway.openai import ChatCompletionRequest
from baton.gateway.responses.items import Chat, Items
from baton.types import SamplingParams

_MAX_ITEMS = 2048
_MAX_TOOLS = 128
_MAX_METADATA = 16
_LOGPROBS = "message.output_text.logprobs"
# What they add comes with every answer, or with tools that nobody can ask for here.
_IDLE_INCLUDES = {
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
}
# Fields that mean in a chat what they mean here.
_SHARED = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
    "structured_outputs",
    "cache_salt",
    "priority",
    "chat_template_kwargs",
    "parallel_tool_calls",
    "top_logprobs",
    "max_output_tokens",
)
# Names of a chat's fields → where they come from.
_NAMES = {
    "messages": "input",
    "response_format": "text",
    "logprobs": "include",
    "reasoning_effort": "reasoning",
}


class Reasoning(Fields):
    effort: Text | None = Field(None, description="A variable of the template.")
    summary: Text | None = Field(None, description="Accepted; reasoning is given in full.")


class TextOptions(Fields):
    format: dict[str, Any] | None = Field(None, description="text, json_object or json_schema")
    verbosity: Text | None = Field(None, description="Accepted and ignored.")


class EventOptions(Fields):
    include_obfuscation: Bool = Field(False, description="Accepted; nothing is padded.")


class ResponsesChat(ChatCompletionRequest):
    """A chat whose errors name the fields of /v1/responses."""

    max_output_tokens: Int | None = None

    @property
    def length_field(self) -> str:
        return "max_output_tokens"

    @property
    def structured_param(self) -> str:
        return "structured_outputs" if self.response_format is None else "text"


class ResponsesRequest(Fields):
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "prompt": (),
        "conversation": (),
        "context_management": ([],),
        "moderation": (),
        "enable_response_messages": (False,),
        "previous_input_messages": ([],),
        "previous_response": (),
        "kv_transfer_params": (),
        "vllm_xargs": ({},),
        "mm_processor_kwargs": ({},),
    }

    model: Text | None = None
    input: NonEmpty | Objects = Field(description="A text, or items.")
    instructions: Text | None = Field(None, description="A system message, of this answer only.")
    previous_response_id: Text | None = None
    max_output_tokens: Int | None = None
    max_tool_calls: Int | None = Field(None, description="Accepted; of built-in tools only.")
    store: Bool | None = Field(None, description="true, if there is a store")
    background: Bool = False
    stream: Bool = False
    stream_options: EventOptions | None = None
    include: list[Text] = Field([], max_length=16)
    top_logprobs: Int = 0
    metadata: dict[str, Any] = Field({}, description="Texts.")
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: list[dict[str, Any]] = Field([], max_length=_MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: Bool = True
    truncation: Literal["auto", "disabled"] = "disabled"
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    seed: Int | None = None
    stop: StopStrings = Field([])
    stop_token_ids: TokenIds = Field([])
    ignore_eos: Bool = False
    skip_special_tokens: Bool | None = None
    include_stop_str_in_output: Bool = False
    logit_bias: dict[str, Any] = Field({})  # looked at as a chat's
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field({})
    cache_salt: Text | None = None
    priority: Int = 0
    service_tier: Text | None = Field(None, description="Accepted and ignored.")
    request_id: Text | None = Field(None, description="Accepted and ignored.")
    session_id: Text | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: Text | None = Field(None, description="Accepted and echoed.")
    prompt_cache_retention: Text | None = Field(None, description="Accepted and echoed.")
    safety_identifier: Text | None = Field(None, description="Accepted and echoed.")
    user: Text | None = Field(None, description="Accepted and echoed.")

    @property
    def format(self) -> dict[str, Any] | None:
        """What the text has to look like; None: anything."""
        return None if self.text is None else self.text.format

    @property
    def wants_logprobs(self) -> bool:
        return _LOGPROBS in self.include

    @property
    def items(self) -> Items:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return self.input

    def check(self) -> None:
        """Rules that chats do not have.

        Raises:
            InvalidRequest
        """
        if isinstance(self.input, list) and not 1 <= len(self.input) <= _MAX_ITEMS:
            raise InvalidRequest(f"input has 1..{_MAX_ITEMS} items", "input")
        if self.background and self.store is False:
            raise InvalidRequest("background needs store=true", "background")
        for name in self.include:
            if name != _LOGPROBS and name not in _IDLE_INCLUDES:
                raise InvalidRequest("include has a name that is not known", "include")
        if self.top_logprobs and not self.wants_logprobs:
            raise InvalidRequest(f"top_logprobs needs include=[{_LOGPROBS}]", "top_logprobs")
        if len(self.metadata) > _MAX_METADATA or not all(
            len(key) <= 64 and isinstance(value, str) and len(value) <= 512
            for key, value in self.metadata.items()
        ):
            raise InvalidRequest(
                f"metadata has {_MAX_METADATA} keys of 64 and values of 512 letters at most",
                "metadata",
            )

    def to_chat(self, messages: Chat, *, goes_on: bool = False) -> ResponsesChat:
        """
        Args:
            messages: the conversation up to the answer, without `instructions`.
            goes_on: the answer continues the last of them.

        Raises:
            InvalidRequest: something that chats here do not have.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in _SHARED}
        fields["logprobs"] = self.wants_logprobs
        system = [] if self.instructions is None else [_system(self.instructions)]
        fields["messages"] = [*system, *messages]
        fields |= {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        fields["response_format"] = _response_format(self.format)
        if self.tools:
            fields["tools"] = [_chat_tool(tool) for tool in self.tools]
        if self.tools or self.tool_choice not in ("none", "auto"):
            fields["tool_choice"] = _tool_choice(self.tool_choice)
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.truncation == "auto":
            fields["truncate_prompt_tokens"] = -1
        return translated(ResponsesChat, fields, _NAMES)


def param_of(name: str | None) -> str:
    """The field that a chat's field was made of."""
    return _NAMES.get(name or "", name or "input")


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _response_format(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    match form:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "json_object"}
        case {"type": "json_schema", "schema": dict() as schema}:
            return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        case {"type": "json_schema"}:
            raise InvalidRequest("json_schema needs a schema.", "text")
    raise InvalidRequest("format.type must be text, json_object or json_schema.", "text")


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InvalidRequest(
            "Only tools of type function are supported.", "tools", Cause.UNSUPPORTED
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool.get(name) for name in names}}


def _tool_choice(choice: str | Mapping[str, Any]) -> object:
    match choice:
        case str():
            return choice
        case {"type": "function", "name": str() as name}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "function"}:
            raise InvalidRequest("tool_choice of type function needs a name.", "tool_choice")
        case {"type": "allowed_tools", "mode": mode, "tools": list() as tools}:
            named = [_tool_choice(tool) for tool in tools if isinstance(tool, dict)]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    raise InvalidRequest(
        "tool_choice must be none, auto, required, or of type function or allowed_tools.",
        "tool_choice",
        Cause.UNSUPPORTED,
    )


def echoed(body: ResponsesRequest, model: str, sampling: SamplingParams) -> dict[str, Any]:
    """The fields of a response that repeat the request; with `sampling`'s values for what that left
    out."""
    effort = body.reasoning.effort if body.reasoning is not None else None
    return {
        "model": model,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "background": body.background,
        "metadata": body.metadata,
        "text": {"format": body.format or {"type": "text"}},
        "reasoning": {"effort": effort, "summary": None},
        "tools": [{"parameters": None, "strict": None, **tool} for tool in body.tools],
        "tool_choice": body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "truncation": body.truncation,
        "temperature": sampling.temperature if body.temperature is None else body.temperature,
        "top_p": sampling.top_p if body.top_p is None else body.top_p,
        "top_logprobs": body.top_logprobs,
        "service_tier": "default",
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": body.prompt_cache_retention,
        "safety_identifier": body.safety_identifier,
        "user": body.user,
    }
