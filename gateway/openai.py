"""The request bodies of /v1/completions and /v1/chat/completions. Rules within one field are in its
type; `check` has those between fields; what the model decides is checked with its prompt."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from baton.errors import InvalidRequest
from baton.gateway.chat_fields import ChatFields
from baton.gateway.defaults import SamplingDefaults
from baton.gateway.fields import Bool, Int, Prompts, RequestFields
from baton.gateway.sampling_fields import SamplingFields
from baton.types import SamplingParams


class GenerationBody(SamplingFields, RequestFields):
    """What both endpoints share."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **SamplingFields.refused,
        "kv_transfer_params": (),
        "ec_transfer_params": (),
        "return_weight_versions": (False,),
        "routed_experts_prompt_start": (0,),
    }

    max_tokens: Int | None = None
    truncate_prompt_tokens: Int | None = Field(
        None, description="Keep so many tokens of the prompt; -1 = as many as fit."
    )
    truncation_side: Literal["left", "right"] = Field("left", description="Where tokens go.")
    return_token_ids: Bool = False
    return_tokens_as_token_ids: Bool | None = None


class CompletionRequest(GenerationBody):
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationBody.refused,
        "prompt_embeds": (),
        "suffix": ("",),
    }

    prompt: Prompts = None
    max_tokens: Int | None = 16
    logprobs: Int | None = Field(None, description="0..20 alternatives for each token")
    echo: Bool = False
    add_special_tokens: Bool = True

    @property
    def wants_output(self) -> bool:
        return not (self.echo and self.max_tokens == 0)

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        return self.sampling(
            defaults,
            max_tokens=self.max_tokens if self.wants_output else 1,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class ChatCompletionRequest(ChatFields, GenerationBody):
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationBody.refused,
        **ChatFields.refused,
        "functions": (),
        "function_call": ("none",),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
    }

    max_completion_tokens: Int | None = None
    logprobs: Bool = False
    top_logprobs: Int = 0
    echo: Bool = False
    include_reasoning: Bool = True
    return_prompt_text: Bool = False

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def check(self) -> None:
        super().check()
        self.check_template()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        logprobs = self.top_logprobs if self.logprobs else None
        names = {"max_tokens": self.length_field, "logprobs": "top_logprobs"}
        try:
            sampling = self.sampling(
                defaults, max_tokens=getattr(self, self.length_field), logprobs=logprobs
            )
        except InvalidRequest as error:
            name = names.get(error.param or "")
            if name in (None, error.param):
                raise
            raise InvalidRequest(error.message.replace(str(error.param), name), name) from None
        grammar = self.call_grammar()
        if grammar is None:
            return sampling
        if sampling.structured_outputs is not None:
            raise InvalidRequest(
                "A call that is demanded excludes another form of output.", "tool_choice"
            )
        return replace(sampling, structured_outputs=grammar)
