"""What the methods of `LLM` return; names and shapes are vLLM's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int | None  # 1 = the most likely
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice of one prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # of the sampled tokens; None if no logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None  # per token: the sampled one and the most likely
    finish_reason: str  # "stop" | "length" | "repetition"
    stop_reason: int | str | None  # the stop id or stop string; None for EOS and length


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt with all its choices."""

    request_id: str
    prompt: str | None  # None when the prompt was token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    # Per prompt token: itself and the most likely; None for the first. None if not asked for.
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    num_cached_tokens: int  # prompt tokens whose KV was there already


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One beam; `tokens` and `text` begin with the prompt."""

    tokens: list[int]
    text: str
    cum_logprob: float  # of the tokens behind the prompt
    finish_reason: str  # "stop" | "length"


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """One prompt; the best sequence first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """One text and its embedding."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0  # nothing is cached
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    score: float


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """One pair of texts and how well they go together."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]  # of both
    num_cached_tokens: int = 0  # nothing is cached
    finished: bool = True
