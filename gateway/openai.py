"""The request bodies of /v1/completions and /v1/chat/completions: fields, defaults, rules.

Names, defaults and bounds are vLLM's (and so OpenAI's where both have the field). A field that
nobody knows is ignored; one that we know but do not serve is refused by name unless it asks for
what happens anyway. `null` means "not given".
"""

import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from baton.errors import Cause, InvalidRequest
from baton.types import SamplingParams

_INT64 = 2**63
_MAX_STOP_STRINGS = 4
_MAX_STOP_TOKEN_IDS = 1024
_MAX_MESSAGES = 2048
_GREEDY_BELOW = 1e-5  # temperature
_MIN_TEMPERATURE = 0.01  # of sampling; less than this overflows in the softmax


def _number(value: object) -> object:
    """JSON numbers only (`true` is none), within 64 bits and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number", "must be a number")
    if not math.isfinite(value) if isinstance(value, float) else not -_INT64 <= value < _INT64:
        raise PydanticCustomError("number_range", "is out of range")
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if item is not None}
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Bool = StrictBool
StopStrings = Annotated[
    list[Annotated[StrictStr, Field(min_length=1)]],
    BeforeValidator(_as_list),
    Field(max_length=_MAX_STOP_STRINGS),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "maxItems": _MAX_STOP_STRINGS,
                },
            ]
        }
    ),
]
_ID_LIST = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _ID_LIST,
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": _ID_LIST, "minItems": 1},
    ]
}


class StreamOptions(BaseModel):
    include_usage: Bool = False
    continuous_usage_stats: Bool = False


class _Body(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    # Known, not served: name → the values that ask for nothing beyond what is served.
    _refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "logit_bias": ({},),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "prompt_logprobs": (),
        "logprob_token_ids": (),
        "return_tokens_as_token_ids": (False,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "repetition_detection": (),
        "thinking_token_budget": (-1,),
        "watermarking": (),
        "kv_transfer_params": (),
        "ec_transfer_params": (),
        "vllm_xargs": ({},),
        "echo": (False,),
    }

    model: StrictStr | None = None
    stream: Bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = None
    n: Int = 1
    temperature: Float | None = Field(None, description="0..2; 0 = greedy")
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    presence_penalty: Float = 0.0
    frequency_penalty: Float = 0.0
    repetition_penalty: Float | None = None
    seed: Int | None = None
    stop: StopStrings = []
    stop_token_ids: list[Int] = Field([], max_length=_MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    min_tokens: Int = 0
    skip_special_tokens: Bool = True
    return_token_ids: Bool = False
    cache_salt: StrictStr | None = Field(None, pattern=r"^[^@/\\\x00]{1,128}$")
    priority: Int = 0
    request_id: StrictStr | None = Field(None, description="Accepted; ids are the server's own.")
    user: StrictStr | None = Field(None, description="Accepted and ignored.")

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: object) -> object:
        """
        Raises:
            InvalidRequest: UNSUPPORTED, a field that is known but not served.
        """
        data = _without_nulls(data)
        if isinstance(data, dict):
            for name in data.keys() & cls._refused.keys():
                if data[name] not in cls._refused[name]:
                    raise InvalidRequest(f"{name} is not supported.", name, Cause.UNSUPPORTED)
            if "stream_options" in data:
                data["stream_options"] = _without_nulls(data["stream_options"])
        return data

    def check(self) -> None:
        """Rules between fields.

        Raises:
            InvalidRequest
        """
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream=true.", "stream_options")
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise InvalidRequest(
                "continuous_usage_stats needs include_usage=true.", "stream_options"
            )
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise InvalidRequest("temperature must be in 0..2", "temperature")

    def _sampling(
        self, defaults: Mapping[str, float], max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """`defaults`: of the model's generation_config, for fields that the body leaves out."""

        def value(name: str, default: float) -> float:
            given = getattr(self, name)
            return float(defaults.get(name, default) if given is None else given)

        temperature = value("temperature", 1.0)
        if temperature < _GREEDY_BELOW:
            temperature = 0.0
            if self.n > 1:
                raise InvalidRequest("n must be 1 when sampling is greedy (temperature 0)", "n")
        elif temperature < _MIN_TEMPERATURE:
            temperature = _MIN_TEMPERATURE
        return SamplingParams(
            n=self.n,
            temperature=temperature,
            top_p=value("top_p", 1.0),
            top_k=int(value("top_k", 0)) if self.top_k is None else self.top_k,
            min_p=value("min_p", 0.0),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=value("repetition_penalty", 1.0),
            seed=secrets.randbits(63) if self.seed in (None, -1) else self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=logprobs,
        )


class CompletionRequest(_Body):
    _refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **_Body._refused,
        "prompt_embeds": (),
        "suffix": ("",),
    }

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)] = None
    max_tokens: Int | None = 16
    logprobs: Int | None = Field(None, description="0..20 alternatives for each token")
    add_special_tokens: Bool = True

    def sampling(self, defaults: Mapping[str, float]) -> SamplingParams:
        """
        Raises:
            InvalidRequest: a value is out of range.
        """
        return self._sampling(defaults, self.max_tokens, self.logprobs)


class ChatCompletionRequest(_Body):
    _refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **_Body._refused,
        "tools": (),
        "tool_choice": ("none",),
        "functions": (),
        "function_call": ("none",),
        "chat_template": (),
        "media_io_kwargs": (),
        "mm_processor_kwargs": (),
        "return_prompt_text": (False,),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
    }

    messages: list[dict[str, Any]] = Field(max_length=_MAX_MESSAGES)
    max_completion_tokens: Int | None = None
    logprobs: Bool = False
    top_logprobs: Int = 0
    add_generation_prompt: Bool = True
    continue_final_message: Bool = False
    add_special_tokens: Bool = False
    chat_template_kwargs: dict[str, Any] = {}
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: StrictStr | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")
        both = {"add_generation_prompt", "continue_final_message"} <= self.model_fields_set
        if both and self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )

    def template_options(self) -> dict[str, Any]:
        """Keyword arguments of `ChatTemplate.render`."""
        variables = dict(self.chat_template_kwargs)
        for name in ("documents", "reasoning_effort"):
            if getattr(self, name) is not None:
                variables[name] = getattr(self, name)
        return {
            "add_generation_prompt": self.add_generation_prompt and not self.continue_final_message,
            "continue_final_message": self.continue_final_message,
            "variables": variables,
        }

    def sampling(self, defaults: Mapping[str, float]) -> SamplingParams:
        """
        Raises:
            InvalidRequest: a value is out of range.
        """
        renamed = self.max_completion_tokens is not None
        max_tokens = self.max_completion_tokens if renamed else self.max_tokens
        try:
            return self._sampling(
                defaults, max_tokens, self.top_logprobs if self.logprobs else None
            )
        except InvalidRequest as error:
            if error.param == "max_tokens" and renamed:
                message = error.message.replace("max_tokens", "max_completion_tokens")
                raise InvalidRequest(message, "max_completion_tokens") from None
            if error.param == "logprobs":
                message = error.message.replace("logprobs", "top_logprobs")
                raise InvalidRequest(message, "top_logprobs") from None
            raise
