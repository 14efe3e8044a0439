"""What a request asks of the sampler, and the one place where its ranges are checked."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from json import dumps, loads
from typing import Any

from baton.errors import InvalidRequest

MAX_TOKEN_ID = (1 << 32) - 1  # on the wire; the vocabulary is checked by whoever knows the model
MAX_TOP_K = 2**31 - 1  # larger than any vocabulary: larger values are clamped
MAX_LOGIT_BIAS = 16_384  # entries
MAX_LOGIT_BIAS_VALUE = 100.0  # larger values are clamped, as OpenAI and vLLM do
MAX_BAD_WORDS = 128  # token sequences
MAX_BAD_WORD_LEN = 128  # tokens of one
MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_PATTERN_SIZE = 1_024  # tokens
MAX_GRAMMAR_BYTES = 64 << 10
MAX_REGEX_BYTES = 4 << 10


class StructuredKind(IntEnum):
    """Numbers are the wire's."""

    JSON_OBJECT = 1  # any JSON object; no text
    JSON_SCHEMA = 2  # text: the schema
    REGEX = 3
    CHOICE = 4  # text: a JSON list of the texts to choose from
    GRAMMAR = 5  # text: Lark, or GBNF (EBNF)
    STRUCTURAL_TAG = 6  # text: vLLM's structural tag, as JSON


_STRUCTURED_FIELDS = {
    StructuredKind.JSON_OBJECT: "json_object",
    StructuredKind.JSON_SCHEMA: "json",
    StructuredKind.REGEX: "regex",
    StructuredKind.CHOICE: "choice",
    StructuredKind.GRAMMAR: "grammar",
    StructuredKind.STRUCTURAL_TAG: "structural_tag",
}


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the output has to look like. Equal specifications share one compiled grammar.

    Raises:
        InvalidRequest: the text is too long, or there is none; `param` is `structured_outputs`.
            Whether it means something, `baton.grammar.Grammars.matcher` says.
    """

    kind: StructuredKind
    text: str = ""
    any_whitespace: bool = True  # JSON: whitespace between tokens is up to the model

    @classmethod
    def of(
        cls,
        *,
        json: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        json_object: bool = False,
        structural_tag: str | Mapping[str, Any] | None = None,
        disable_any_whitespace: bool = False,
    ) -> "StructuredOutput":
        """Exactly one of the kinds, by vLLM's names.

        Raises:
            InvalidRequest
        """
        texts = {
            StructuredKind.JSON_OBJECT: "" if json_object else None,
            StructuredKind.JSON_SCHEMA: _as_json(json),
            StructuredKind.REGEX: regex,
            StructuredKind.CHOICE: None if choice is None else dumps(list(choice)),
            StructuredKind.GRAMMAR: grammar,
            StructuredKind.STRUCTURAL_TAG: _as_json(structural_tag),
        }
        given = [(kind, text) for kind, text in texts.items() if text is not None]
        _check(len(given) == 1, "structured_outputs", "needs exactly one kind")
        return cls(*given[0], any_whitespace=not disable_any_whitespace)

    def fields(self) -> dict[str, Any]:
        """As the HTTP API's `structured_outputs` has it; `of(**fields)` is equal to this."""
        value: Any = self.text
        if self.kind is StructuredKind.JSON_OBJECT:
            value = True
        elif self.kind is StructuredKind.CHOICE:
            value = loads(self.text)
        fields = {_STRUCTURED_FIELDS[self.kind]: value}
        return fields if self.any_whitespace else {**fields, "disable_any_whitespace": True}

    def __post_init__(self) -> None:
        needs_text = self.kind is not StructuredKind.JSON_OBJECT
        _check(bool(self.text) == needs_text, "structured_outputs", "must not be empty")
        limit = MAX_REGEX_BYTES if self.kind is StructuredKind.REGEX else MAX_GRAMMAR_BYTES
        num_bytes = len(self.text.encode(errors="replace"))
        _check(num_bytes <= limit, "structured_outputs", f"must have at most {limit} bytes")


@dataclass(frozen=True, slots=True)
class RepetitionDetection:
    """End a choice (FinishReason.REPETITION) when its output ends in the same `min_pattern_size` to
    `max_pattern_size` tokens, `min_count` times in a row. A `min_pattern_size` of 0 means 1.

    Raises:
        InvalidRequest: a value is out of range; `param` is `repetition_detection`.
    """

    max_pattern_size: int
    min_pattern_size: int = 0
    min_count: int = 2

    def __post_init__(self) -> None:
        def check(ok: bool, rule: str) -> None:
            _check(ok, "repetition_detection", rule)

        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            check(type(getattr(self, name)) is int, f"needs an integer {name}")
        size = self.max_pattern_size
        check(1 <= size <= MAX_PATTERN_SIZE, f"needs max_pattern_size in 1..{MAX_PATTERN_SIZE}")
        in_range = 0 <= self.min_pattern_size <= size
        check(in_range, "needs min_pattern_size in 0..max_pattern_size")
        check(2 <= self.min_count <= MAX_TOKEN_ID, "needs min_count of at least 2")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What to sample and when to stop; vLLM's names, defaults and meanings.

    Lists may be given for tuples, and a mapping for `logit_bias`.

    Raises:
        InvalidRequest: a value is out of range; `param` names the field.
    """

    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # the gateway (or LLM) draws one before a request leaves it
    max_tokens: int | None = (
        16  # None = up to the model's length; resolved before it leaves the gateway
    )
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()  # matched by the gateway (or LLM), never by the engine
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True  # in texts, which the gateway (or LLM) makes
    logprobs: int | None = None  # number of alternatives besides the sampled token; None = none
    processed_logprobs: bool = False  # after masks, bias and penalties; no field of the HTTP API
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), by id
    allowed_token_ids: tuple[int, ...] | None = None  # None = all
    bad_words: tuple[str, ...] = ()  # turned into ids by the gateway (or LLM), never sent
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # sequences that never complete
    prompt_logprobs: int | None = None  # as `logprobs`, of the prompt's tokens
    logprob_token_ids: tuple[int, ...] = ()  # further tokens whose logprobs are wanted
    repetition_detection: RepetitionDetection | None = None
    structured_outputs: StructuredOutput | None = None

    def __post_init__(self) -> None:
        self._normalize()
        _check(isinstance(self.n, int) and 1 <= self.n <= 128, "n", "must be in 1..128")
        self._check_distribution()
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _check(self.min_tokens >= 0, "min_tokens", "must be at least 0")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            "must not exceed max_tokens",
        )
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits")
        self._check_logprobs()
        self._check_token_ids()

    def _normalize(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "top_k", min(self.top_k, MAX_TOP_K))
        for name in ("stop", "stop_token_ids", "bad_words", "logprob_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        sequences = tuple(tuple(ids) for ids in self.bad_words_token_ids or ())
        object.__setattr__(self, "bad_words_token_ids", sequences)
        object.__setattr__(self, "logit_bias", _as_bias(self.logit_bias))

    def _check_distribution(self) -> None:
        _check(
            _finite(self.temperature) and 0 <= self.temperature <= 100,
            "temperature",
            "must be in 0..100",
        )
        _check(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        _check(self.top_k >= -1, "top_k", "must be -1 or 0 (off) or positive")
        _check(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "must be in 0..1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_finite(value) and -2 <= value <= 2, name, "must be in -2..2")
        value = self.repetition_penalty
        _check(_finite(value) and 0 < value <= 100, "repetition_penalty", "must be in (0, 100]")

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(
                value is None or 0 <= value <= MAX_LOGPROBS, name, f"must be in 0..{MAX_LOGPROBS}"
            )
        ids = self.logprob_token_ids
        _check(not ids or self.logprobs is not None, "logprob_token_ids", "needs logprobs")
        _check_ids(ids, "logprob_token_ids", MAX_LOGPROB_TOKEN_IDS)

    def _check_token_ids(self) -> None:
        _check_ids([token_id for token_id, _ in self.logit_bias], "logit_bias", MAX_LOGIT_BIAS)
        if self.allowed_token_ids is not None:
            _check(bool(self.allowed_token_ids), "allowed_token_ids", "must not be empty")
            _check_ids(self.allowed_token_ids, "allowed_token_ids")
        _check("" not in self.bad_words, "bad_words", "must not have an empty text")
        for words in (self.bad_words, self.bad_words_token_ids):
            _check(len(words) <= MAX_BAD_WORDS, "bad_words", f"must be at most {MAX_BAD_WORDS}")
        for ids in self.bad_words_token_ids:
            _check(bool(ids), "bad_words", "must not have an empty text")
            _check_ids(ids, "bad_words", MAX_BAD_WORD_LEN)

    def max_token_id(self) -> tuple[int, str]:
        """The largest token id in here and the field that has it; (-1, "") when there is none.

        For whoever knows the vocabulary: `stop_token_ids` are not part of it, since one that does
        not exist only never comes.
        """
        fields = {
            "logit_bias": [token_id for token_id, _ in self.logit_bias],
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [token_id for ids in self.bad_words_token_ids for token_id in ids],
            "logprob_token_ids": self.logprob_token_ids,
        }
        return max(((max(ids), name) for name, ids in fields.items() if ids), default=(-1, ""))

    def choice_seed(self, choice: int) -> int:
        """The 32-bit seed of one choice: a fixed function of (seed, choice), so that every worker
        agrees."""
        assert self.seed is not None, "a seed is drawn by the gateway"
        digest = hashlib.sha256(
            b"baton-seed-1"
            + self.seed.to_bytes(8, "little", signed=True)
            + choice.to_bytes(4, "little")
        )
        return int.from_bytes(digest.digest()[:4], "little")


def _as_json(value: str | Mapping[str, Any] | None) -> str | None:
    return value if value is None or isinstance(value, str) else dumps(dict(value))


def _as_bias(given: object) -> tuple[tuple[int, float], ...]:
    """Sorted by id, values clamped."""
    pairs = given.items() if isinstance(given, Mapping) else given or ()
    try:
        bias = {int(token_id): float(value) for token_id, value in pairs}  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest("logit_bias must map token ids to numbers", "logit_bias") from None
    _check(all(map(math.isfinite, bias.values())), "logit_bias", "must have finite values")
    limit = MAX_LOGIT_BIAS_VALUE
    return tuple(sorted((i, min(max(value, -limit), limit)) for i, value in bias.items()))


def _check_ids(ids: Collection[int], param: str, limit: int | None = None) -> None:
    if limit is not None:
        _check(len(ids) <= limit, param, f"must have at most {limit} entries")
    for token_id in ids:
        is_id = type(token_id) is int and 0 <= token_id <= MAX_TOKEN_ID
        _check(is_id, param, "must have token ids only")


def _finite(value: float) -> bool:
    return not isinstance(value, bool) and math.isfinite(value)


def _check(ok: bool, param: str, rule: str) -> None:
    if not ok:
        raise InvalidRequest(f"{param} {rule}", param)
