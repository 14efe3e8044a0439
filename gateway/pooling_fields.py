"""The request bodies of /v1/embeddings, /score and /rerank."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from baton.errors import InvalidRequest
from baton.gateway.fields import Bool, Fields, Int, NonEmpty, Prompts, Text, as_list
from baton.scoring import Pair, pair_up

_MAX_MESSAGES = 2048
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}
Texts = Annotated[
    list[NonEmpty],
    Field(fail_fast=True),
    Field(min_length=1),
    BeforeValidator(as_list),
    WithJsonSchema(_TEXTS),
]


class PoolingFields(Fields):
    """What these endpoints share."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "padding": (False, "do_not_pad"),
        "mm_processor_kwargs": ({},),
    }

    model: Text | None = None
    truncate_prompt_tokens: Int | None = Field(
        None, description="Keep so many tokens of an input; -1 = as many as the model reads."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Where tokens go; the tokenizer's own side if absent."
    )
    use_activation: Bool | None = Field(
        None, description="Norm 1 of embeddings, sigmoid of scores; as the model does if absent."
    )
    priority: Int = 0
    request_id: Text | None = Field(
        None, max_length=256, description="Becomes part of the answer's id."
    )
    cache_salt: Text | None = Field(None, description="Accepted and ignored: nothing is cached.")
    user: Text | None = Field(None, description="Accepted and ignored.")

    def max_tokens(self, max_model_len: int) -> int | None:
        """Of one input; None: what is longer than the model is refused.

        Raises:
            InvalidRequest
        """
        asked = self.truncate_prompt_tokens
        if asked is not None and asked != -1 and not 1 <= asked <= max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1 or in 1..{max_model_len}.",
                "truncate_prompt_tokens",
            )
        return max_model_len if asked == -1 else asked


class EmbeddingRequest(PoolingFields):
    """Texts, token ids, or a chat."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **PoolingFields.refused,
        "chat_template": (),  # a program from a stranger
    }

    input: Prompts = None
    messages: list[dict[str, Any]] = Field([], max_length=_MAX_MESSAGES)
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32", "float16"] = Field("float32", description="In base64.")
    endianness: Literal["native", "little", "big"] = Field("native", description="In base64.")
    dimensions: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="The first so many values, of a Matryoshka model."
    )
    add_special_tokens: Bool | None = Field(None, description="true for texts, false for a chat.")
    add_generation_prompt: Bool = False
    continue_final_message: Bool = False
    chat_template_kwargs: dict[str, Any] = Field({})

    def check(self) -> None:
        """
        Raises:
            InvalidRequest: two fields exclude each other.
        """
        if (self.input is None) == (not self.messages):
            raise InvalidRequest("Give either input or messages.", "input")
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )

    def template_options(self) -> dict[str, Any]:
        """Keyword arguments of `ChatTemplate.render`."""
        return {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "tools": None,
            "variables": self.chat_template_kwargs,
        }


class ScoreRequest(PoolingFields):
    """Pairs: one text with each of the others, or two lists of one length, side by side."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = Field(None, description="text_1 by another name.")
    documents: Texts | None = Field(None, description="text_2 by another name.")
    data_1: Texts | None = Field(None, description="text_1 by another name.")
    data_2: Texts | None = Field(None, description="text_2 by another name.")
    items: Texts | None = Field(None, description="text_2 by another name.")

    def pairs(self) -> list[Pair]:
        """
        Raises:
            InvalidRequest: a side is missing, or they do not go together.
        """
        first = self._side("text_1", "queries", "data_1")
        second = self._side("text_2", "documents", "data_2", "items")
        return pair_up(first, second, "text_2")

    def _side(self, *names: str) -> list[str]:
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(f"Give one of {', '.join(names)}.", names[0])
        found: list[str] = getattr(self, given[0])
        return found


class RerankRequest(PoolingFields):
    """Documents in the order of their relevance to a query."""

    query: NonEmpty
    documents: Annotated[list[NonEmpty], Field(fail_fast=True), Field(min_length=1)]
    top_n: Annotated[Int, Field(ge=0)] = Field(0, description="The best so many; 0 = all.")
