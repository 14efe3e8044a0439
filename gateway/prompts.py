"""From the fields of a body to token ids."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from baton.errors import Cause, InvalidRequest
from baton.gateway.chat_fields import ChatFields
from baton.gateway.context import Context
from baton.gateway.openai import GenerationBody
from baton.settings import LimitSettings

MAX_CHARS_PER_TOKEN = 256  # no vocabulary in use has a longer token
TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the ids were made of; None where the client sent ids."""

    token_ids: TokenIds
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep `num_tokens` of a prompt, dropping from `side`; None keeps all."""

    num_tokens: int | None = None
    side: Literal["left", "right"] = "left"

    @classmethod
    def to_fit(cls, body: GenerationBody, max_model_len: int) -> "Truncation":
        """-1 asks for as much as leaves room for the output.

        Raises:
            InvalidRequest: truncate_prompt_tokens is more than the model's length.
        """
        asked = body.truncate_prompt_tokens
        if asked is not None and not -1 <= asked <= max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens must be in -1..{max_model_len}", "truncate_prompt_tokens"
            )
        if asked == -1:
            asked = max(max_model_len - max(getattr(body, body.length_field) or 0, 1), 0)
        return cls(asked, body.truncation_side)

    def bound(self, text: str) -> str:
        """What of a text can matter, so that the rest costs nothing."""
        if self.num_tokens is None:
            return text
        num_chars = (self.num_tokens + 1) * MAX_CHARS_PER_TOKEN
        return text[-num_chars:] if self.side == "left" else text[:num_chars]

    def apply(self, prompt: Prompt) -> Prompt:
        ids, keep = prompt.token_ids, self.num_tokens
        if keep is None or keep >= len(ids):
            return prompt
        return Prompt(ids[len(ids) - keep :] if self.side == "left" else ids[:keep])


def parse_prompts(prompt: object, param: str = "prompt") -> list[str | TokenIds]:
    """A text, a list of texts, a list of ids or a list of id lists → one entry per prompt.

    Args:
        param: the field.

    Raises:
        InvalidRequest: none of these, or one that is empty.
    """
    if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
        return [_parse_prompt(item, param) for item in prompt]
    return [_parse_prompt(prompt, param)]


def _parse_prompt(prompt: object, param: str) -> str | TokenIds:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and set(map(type, prompt)) == {int}:  # bool is none
        return tuple(prompt)
    raise InvalidRequest(
        f"{param} must be a text, a list of texts, a list of token ids or a list of such lists, "
        "and not empty.",
        param,
    )


async def encode_prompts(
    context: Context,
    prompts: Sequence[str | TokenIds],
    *,
    add_special_tokens: bool,
    max_model_len: int,
    truncation: Truncation,
) -> list[Prompt]:
    """
    Raises:
        InvalidRequest: a text is far too long.
        BatonError: OVERLOADED.
    """

    async def encode(prompt: str | TokenIds) -> Prompt:
        if not isinstance(prompt, str):
            return truncation.apply(Prompt(prompt))
        text = truncation.bound(prompt)
        check_num_chars(len(text), max_model_len, context.limits, "prompt")
        ids = await context.tokenizers.encode(
            text, add_special_tokens=add_special_tokens, is_only=len(prompts) == 1
        )
        return truncation.apply(Prompt(tuple(ids), prompt))

    if len(prompts) == 1:  # no task, no turn of the loop
        return [await encode(prompts[0])]
    return list(await asyncio.gather(*map(encode, prompts)))


async def render_prompt(
    context: Context, body: ChatFields, *, max_model_len: int, truncation: Truncation
) -> Prompt:
    """
    Raises:
        InvalidRequest: the messages are malformed, refused by the template, or far too long.
        BatonError: OVERLOADED.
    """
    rendered = await context.tokenizers.render_chat(body.messages, **body.template_options())
    text = truncation.bound(rendered)
    check_num_chars(len(text), max_model_len, context.limits, "messages")
    ids = await context.tokenizers.encode(
        text, add_special_tokens=body.add_special_tokens, is_only=True
    )
    return truncation.apply(Prompt(tuple(ids), text))


def check_num_chars(num_chars: int, max_model_len: int, limits: LimitSettings, param: str) -> None:
    """Refuse a text that cannot fit, before the time and the memory to tokenize it are spent.

    Raises:
        InvalidRequest: of `param`.
    """
    if num_chars > max_model_len * MAX_CHARS_PER_TOKEN:
        raise InvalidRequest(
            f"The prompt has {num_chars} characters, more than {max_model_len} tokens can hold.",
            param,
            Cause.CONTEXT_LENGTH_EXCEEDED,
        )
    if num_chars > limits.max_text_chars:
        raise InvalidRequest(
            f"The text has {num_chars} characters; here it may have {limits.max_text_chars}.", param
        )
