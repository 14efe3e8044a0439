"""Types of JSON fields, and what all request bodies have in common.

`null` means "not given". A field that nobody knows is ignored; one that is known but not served is
refused by name, unless it asks for what happens anyway.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from baton.errors import Cause, InvalidRequest
from baton.gateway.defaults import SamplingDefaults
from baton.types import SamplingParams

_INT64 = 2**63
_MAX_STOP_CHARS = 4096
_MAX_STOP_STRINGS = 4
_MAX_REQUEST_ID_CHARS = 256


def _number(value: object) -> object:
    """JSON numbers only (`true` is none), within 64 bits and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number", "must be a number")
    if not math.isfinite(value) if isinstance(value, float) else not -_INT64 <= value < _INT64:
        raise PydanticCustomError("number_range", "is out of range")
    return value


def as_list(value: object) -> object:
    """One text stands for a list of one."""
    return [value] if isinstance(value, str) else value


def without_nulls(value: object) -> object:
    """A JSON object's fields that are given."""
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if item is not None}
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Bool = StrictBool
Text = StrictStr
NonEmpty = Annotated[StrictStr, Field(min_length=1)]
# No Python per item, and no list of a million errors.
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
TokenIds = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, lt=2**32)]], Field(fail_fast=True)
]

# The matcher's table is made on the event loop, in time that grows with the length.
StopString = Annotated[StrictStr, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
_STOP = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARS}
StopStrings = Annotated[
    list[StopString],
    Field(fail_fast=True),
    Field(max_length=_MAX_STOP_STRINGS),
    BeforeValidator(as_list),
    WithJsonSchema(
        {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": _MAX_STOP_STRINGS}]}
    ),
]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[  # its union is told apart by hand, for a message that says so
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                _IDS,
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


def _all_nullable(schema: dict[str, Any]) -> None:
    """The document says what `without_nulls` does."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        options = field.get("anyOf", ())
        if name not in required and {"type": "null"} not in options:
            title = field.pop("title", name)
            description = {k: field.pop(k) for k in ("description", "default") if k in field}
            schema["properties"][name] = {
                "anyOf": [*(options or (field,)), {"type": "null"}],
                "title": title,
                **description,
            }


class Fields(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="ignore", frozen=True, json_schema_extra=_all_nullable)

    # Known, not served: name → the values that ask for nothing beyond what is served.
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: object) -> object:
        """
        Raises:
            InvalidRequest: UNSUPPORTED, a field that is known but not served.
        """
        data = without_nulls(data)
        if isinstance(data, dict):
            for name in data.keys() & cls.refused.keys():
                if data[name] not in cls.refused[name]:
                    raise InvalidRequest(f"{name} is not supported.", name, Cause.UNSUPPORTED)
        return data


Body = TypeVar("Body", bound=Fields)


def translated(kind: type[Body], fields: dict[str, Any], names: Mapping[str, str]) -> Body:
    """A body that was made of another one.

    Args:
        names: fields of `kind` → where they come from, if that is called otherwise.

    Raises:
        InvalidRequest: what came from there does not fit.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        name = names.get(field, field)
        raise InvalidRequest(f"{name}: {first['msg']}", name or None) from None


class StreamOptions(Fields):
    include_usage: Bool = False
    continuous_usage_stats: Bool = False


class RequestFields(Fields):
    """What every request for tokens says besides what it wants to know."""

    model: Text | None = None
    stream: Bool = False
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="Tokens in one chunk; never less than the server's."
    )
    cache_salt: Text | None = Field(None, pattern=r"^[^@/\\\x00]{1,128}$")
    priority: Int = 0
    request_id: Text | None = Field(
        None, max_length=_MAX_REQUEST_ID_CHARS, description="Becomes part of the answer's id."
    )
    session_id: Text | None = Field(None, description="Accepted and ignored.")
    user: Text | None = Field(None, description="Accepted and ignored.")

    @property
    def length_field(self) -> str:
        """The field that limits the output."""
        return "max_tokens"

    @property
    def wants_output(self) -> bool:
        """False: the prompt alone is of interest."""
        return True

    @property
    def structured_param(self) -> str:
        """The field that says what the output has to look like."""
        return "structured_outputs"

    @property
    def beam_length_penalty(self) -> float | None:
        """None: no beam search."""
        return None

    @property
    def include_usage(self) -> bool:
        """A stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def asks_prompt_logprobs(self) -> bool:
        """By that field."""
        raise NotImplementedError

    def check(self) -> None:
        """Rules between fields.

        Raises:
            InvalidRequest
        """
        if self.stream and self.asks_prompt_logprobs:
            raise InvalidRequest("prompt_logprobs cannot be streamed.", "prompt_logprobs")
        if self.stream and self.beam_length_penalty is not None:
            raise InvalidRequest("A beam search cannot be streamed.", "use_beam_search")
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream=true.", "stream_options")
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise InvalidRequest(
                "continuous_usage_stats needs include_usage=true.", "stream_options"
            )

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """How to sample; `defaults` stand for what is left out.

        Raises:
            InvalidRequest: a value is out of range.
        """
        raise NotImplementedError
