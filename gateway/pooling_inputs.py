"""From texts and token ids to what a pooling model reads."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from baton.errors import InvalidRequest
from baton.gateway.backend import ServedModel
from baton.gateway.context import Context
from baton.gateway.pooling_fields import EmbeddingRequest, PoolingFields
from baton.gateway.prompts import MAX_CHARS_PER_TOKEN, TokenIds, check_num_chars, parse_prompts
from baton.pooling import PoolingInput, check_input
from baton.scoring import Pair

Item = TypeVar("Item")
_TOKENIZED_AT_ONCE = 4


def parse_inputs(context: Context, body: EmbeddingRequest) -> list[str | TokenIds]:
    """Of a request without messages.

    Raises:
        InvalidRequest
    """
    inputs = parse_prompts(body.input, "input")
    check_num_inputs(context, len(inputs), "input")
    return inputs


def check_num_inputs(context: Context, num_inputs: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: they are too many.
    """
    most = context.limits.max_inputs
    if num_inputs > most:
        raise InvalidRequest(f"One request may have {most} inputs.", param)


class InputEncoder:
    """For one request."""

    def __init__(self, context: Context, body: PoolingFields, model: ServedModel) -> None:
        """
        Raises:
            InvalidRequest: truncate_prompt_tokens is out of range.
        """
        self._context = context
        self._model = model
        self._max_tokens = body.max_tokens(model.max_model_len)
        self._side = body.truncation_side or context.tokenizers.tokenizer.truncation_side

    async def chat(self, body: EmbeddingRequest) -> tuple[PoolingInput, ...]:
        """
        Raises:
            InvalidRequest: the messages are malformed, refused by the template, or too long.
            BatonError: OVERLOADED.
        """
        options = body.template_options()
        text = await self._context.tokenizers.render_chat(body.messages, **options)
        adds = bool(body.add_special_tokens)
        return self._checked([await self._text(text, adds, "messages")], "messages")

    async def texts(
        self, inputs: Sequence[str | TokenIds], param: str, *, add_special_tokens: bool = True
    ) -> tuple[PoolingInput, ...]:
        """
        Raises:
            InvalidRequest: one is too long, or has ids that the model lacks.
            BatonError: OVERLOADED.
        """

        async def encode(one: str | TokenIds) -> PoolingInput:
            if isinstance(one, str):
                return await self._text(one, add_special_tokens, param)
            return PoolingInput(self._cut(one))

        return self._checked(await _all(encode, inputs), param)

    async def pairs(self, pairs: Sequence[Pair], param: str) -> tuple[PoolingInput, ...]:
        """Each for a model that looks at both texts together; raises as `texts`."""
        pooling = self._model.pooling
        tells_pairs = pooling is not None and pooling.tells_pairs

        async def encode(pair: Pair) -> PoolingInput:
            first, second = (self._bound(text, param) for text in pair)
            ids, second_start = await self._context.tokenizers.encode_input(
                first, second, **self._options()
            )
            return PoolingInput(tuple(ids), second_start if tells_pairs else None)

        return self._checked(await _all(encode, pairs), param)

    async def _text(self, text: str, add_special_tokens: bool, param: str) -> PoolingInput:
        ids, _ = await self._context.tokenizers.encode_input(
            self._bound(text, param), add_special_tokens=add_special_tokens, **self._options()
        )
        return PoolingInput(tuple(ids))

    def _options(self) -> dict[str, Any]:
        return {"max_tokens": self._max_tokens, "truncation_side": self._side}

    def _bound(self, text: str, param: str) -> str:
        """What of a text can matter, so that the rest costs nothing.

        Raises:
            InvalidRequest: it is far too long, and not to be cut.
        """
        if self._max_tokens is None:
            check_num_chars(len(text), self._model.max_model_len, self._context.limits, param)
            return text
        num_chars = (self._max_tokens + 1) * MAX_CHARS_PER_TOKEN
        return text[-num_chars:] if self._side == "left" else text[:num_chars]

    def _cut(self, ids: TokenIds) -> TokenIds:
        keep = self._max_tokens
        if keep is None or keep >= len(ids):
            return ids
        return ids[len(ids) - keep :] if self._side == "left" else ids[:keep]

    def _checked(self, inputs: Sequence[PoolingInput], param: str) -> tuple[PoolingInput, ...]:
        model, budget = self._model, self._context.limits.max_request_tokens
        for one in inputs:
            check_input(one, model.max_model_len, model.vocab_size, param)
        num_tokens = sum(len(one.token_ids) for one in inputs)
        if num_tokens > budget:
            raise InvalidRequest(
                f"The inputs have {num_tokens} tokens together; one request may have {budget}.",
                param,
            )
        return tuple(inputs)


async def _all(
    encode: Callable[[Item], Awaitable[PoolingInput]], items: Sequence[Item]
) -> list[PoolingInput]:
    """In order; a few at a time, so that others get at the tokenizer, too."""
    encoded: list[PoolingInput] = []
    for start in range(0, len(items), _TOKENIZED_AT_ONCE):
        encoded += await asyncio.gather(*map(encode, items[start : start + _TOKENIZED_AT_ONCE]))
    return encoded
