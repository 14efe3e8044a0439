"""Messages, and how the model's template makes a prompt of them."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from baton.errors import InvalidRequest
from baton.gateway.fields import Bool
from baton.gateway.tool_fields import ToolFields

_MAX_MESSAGES = 2048
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatFields(ToolFields):
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "chat_template": (),  # a program from a stranger
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    }

    messages: list[dict[str, Any]] = Field(max_length=_MAX_MESSAGES)
    add_generation_prompt: Bool = True
    continue_final_message: Bool = False
    add_special_tokens: Bool = False
    chat_template_kwargs: dict[str, Any] = Field({})
    documents: list[dict[str, Any]] | None = Field(None, max_length=_MAX_MESSAGES)
    reasoning_effort: ReasoningEffort | None = None

    def check_template(self) -> None:
        """
        Raises:
            InvalidRequest: two fields exclude each other.
        """
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
            "tools": self.template_tools(),
            "variables": variables,
        }
