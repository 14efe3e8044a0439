"""How to sample and when to stop, as fields of a body. Names, defaults and bounds are vLLM's (and
so OpenAI's where both have the field)."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from baton.beam_search import MAX_BEAM_WIDTH, MAX_LENGTH_PENALTY
from baton.errors import InvalidRequest
from baton.gateway.defaults import SamplingDefaults
from baton.gateway.fields import Bool, Fields, Float, Int, NonEmpty, StopStrings, TokenIds
from baton.gateway.structured import of_response_format, of_structured_outputs
from baton.sampling_params import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS
from baton.types import RepetitionDetection, SamplingParams, StructuredOutput

_MAX_STOP_TOKEN_IDS = 1024
_MAX_ALLOWED_TOKEN_IDS = 2**18
_GREEDY_BELOW = 1e-5  # temperature
_MIN_TEMPERATURE = 0.01  # of sampling; less than this overflows in the softmax


_IdKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]  # keys of JSON objects are texts


def _not_large(value: object) -> object:
    """Before its entries are looked at."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("too_long", "has too many entries")
    return value


class Repetition(Fields):
    """A pattern of so many tokens, so many times in a row, ends a choice."""

    max_pattern_size: Int
    min_pattern_size: Int = 0
    min_count: Int = 2


class SamplingFields(Fields):
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "thinking_token_budget": (-1,),
        "watermarking": (),
        "vllm_xargs": ({},),
    }

    n: Int = 1
    temperature: Float | None = Field(None, description="0..2; 0 = greedy")
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    seed: Int | None = None
    stop: StopStrings = Field([])
    stop_token_ids: TokenIds = Field([], max_length=_MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    min_tokens: Int = 0
    logit_bias: Annotated[dict[_IdKey, Float], BeforeValidator(_not_large)] = Field(
        {}, description="Token id → added to its logit."
    )
    prompt_logprobs: Int | None = Field(None, description="As logprobs, of the prompt's tokens.")
    logprob_token_ids: TokenIds = Field(
        [], max_length=MAX_LOGPROB_TOKEN_IDS, description="More tokens whose logprobs are wanted."
    )
    bad_words: list[NonEmpty] = Field([], max_length=MAX_BAD_WORDS)
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, json_schema or structural_tag"
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="One of json, regex, choice, grammar, json_object, structural_tag."
    )
    use_beam_search: Bool = Field(
        False,
        description="n is the beam width; of the fields that sample, only allowed_token_ids and "
        "logit_bias count.",
    )
    length_penalty: Float = 1.0
    allowed_token_ids: TokenIds | None = Field(
        None, min_length=1, max_length=_MAX_ALLOWED_TOKEN_IDS
    )
    repetition_detection: Repetition | None = None
    skip_special_tokens: Bool | None = None
    spaces_between_special_tokens: Bool = Field(
        True, description="No supported tokenizer puts spaces there, so both values do the same."
    )

    def sampling(
        self,
        defaults: SamplingDefaults,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """`defaults` stand for fields that the body leaves out; `prompt_logprobs` for that field.

        Raises:
            InvalidRequest: a value is out of range.
        """
        repetition, skips = self.repetition_detection, self.skip_special_tokens
        self._check_beams()
        return SamplingParams(
            n=self.n,
            temperature=self._temperature(defaults),
            top_p=self._value("top_p", 1.0, defaults),
            top_k=int(self._value("top_k", 0, defaults)) if self.top_k is None else self.top_k,
            min_p=self._value("min_p", 0.0, defaults),
            presence_penalty=self._value("presence_penalty", 0.0, defaults),
            frequency_penalty=self._value("frequency_penalty", 0.0, defaults),
            repetition_penalty=self._value("repetition_penalty", 1.0, defaults),
            seed=secrets.randbits(63) if self.seed in (None, -1) else self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=tuple(self.stop),
            stop_token_ids=self._stop_token_ids(defaults),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=defaults.skip_special_tokens if skips is None else skips,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs
            if self.prompt_logprobs is None
            else self.prompt_logprobs,
            logprob_token_ids=tuple(self.logprob_token_ids),
            bad_words=tuple(self.bad_words),
            structured_outputs=self._structured(),
            logit_bias=tuple((int(key), value) for key, value in self.logit_bias.items()),
            allowed_token_ids=None
            if self.allowed_token_ids is None
            else tuple(self.allowed_token_ids),
            repetition_detection=None
            if repetition is None
            else RepetitionDetection(**dict(repetition)),
        )

    @property
    def asks_prompt_logprobs(self) -> bool:
        return self.prompt_logprobs is not None

    @property
    def beam_length_penalty(self) -> float | None:
        """None: no beam search."""
        return self.length_penalty if self.use_beam_search else None

    def _check_beams(self) -> None:
        if not self.use_beam_search:
            return
        if not 1 <= self.n <= MAX_BEAM_WIDTH:
            raise InvalidRequest(f"n must be in 1..{MAX_BEAM_WIDTH} with use_beam_search", "n")
        if not -MAX_LENGTH_PENALTY <= self.length_penalty <= MAX_LENGTH_PENALTY:
            limit = MAX_LENGTH_PENALTY
            raise InvalidRequest(f"length_penalty must be in -{limit}..{limit}", "length_penalty")
        if self.structured_outputs is not None or self.response_format not in (
            None,
            {"type": "text"},
        ):
            raise InvalidRequest("A beam search has no structured output", "use_beam_search")

    @property
    def structured_param(self) -> str:
        """The field that says what the output has to look like."""
        return "structured_outputs" if self.response_format is None else "response_format"

    def _structured(self) -> StructuredOutput | None:
        form = None if self.response_format is None else of_response_format(self.response_format)
        if self.structured_outputs is None:
            return form
        if form is not None:
            raise InvalidRequest(
                "response_format and structured_outputs exclude each other", "structured_outputs"
            )
        return of_structured_outputs(self.structured_outputs)

    def _value(self, name: str, otherwise: float, defaults: SamplingDefaults) -> float:
        given = getattr(self, name)
        return float(defaults.values.get(name, otherwise) if given is None else given)

    def _temperature(self, defaults: SamplingDefaults) -> float:
        temperature = self._value("temperature", 1.0, defaults)
        if not 0 <= temperature <= 2:
            raise InvalidRequest("temperature must be in 0..2", "temperature")
        if temperature < _GREEDY_BELOW:
            if self.n > 1 and not self.use_beam_search:
                raise InvalidRequest("n must be 1 when sampling is greedy (temperature 0)", "n")
            return 0.0
        return max(temperature, _MIN_TEMPERATURE)

    def _stop_token_ids(self, defaults: SamplingDefaults) -> tuple[int, ...]:
        also = () if self.ignore_eos else defaults.eos_token_ids
        return tuple(dict.fromkeys((*self.stop_token_ids, *also)))
