"""Beam search over anything that says how likely the next tokens are. A pure state machine.

The algorithm is transformers' (`num_beams`, early_stopping=False), so that results compare: each
step ranks all continuations of all beams by their sum of log-probabilities. Those among the first
`beam_width` that end become results, scored by sum / length ** length_penalty (output tokens, EOS
included); the best `beam_width` that do not end go on. It is over at `max_tokens`, or when the best
beam, at its present length, would not make it into a full set of results.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from baton.errors import InvalidRequest
from baton.sampling_params import MAX_LOGPROBS
from baton.types import FinishReason, Logprobs, SamplingParams

MAX_BEAM_WIDTH = 16
MAX_LENGTH_PENALTY = 10


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """vLLM's names. `temperature` is accepted and changes nothing, as there.

    Raises:
        InvalidRequest: a value is out of range; `param` names the field.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    allowed_token_ids: Sequence[int] | None = None  # None = all

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_BEAM_WIDTH:
            raise InvalidRequest(f"beam_width must be in 1..{MAX_BEAM_WIDTH}", "beam_width")
        if self.max_tokens < 1:
            raise InvalidRequest("max_tokens must be at least 1", "max_tokens")
        limit = MAX_LENGTH_PENALTY
        if not -limit <= self.length_penalty <= limit:
            raise InvalidRequest(f"length_penalty must be in -{limit}..{limit}", "length_penalty")
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))


@dataclass(frozen=True, slots=True)
class Beam:
    """Output tokens so far, what was likely in place of each, and their sum."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None

    def score(self, length_penalty: float) -> float:
        return self.cumulative_logprob / math.pow(max(len(self.token_ids), 1), length_penalty)

    def extended(self, rank: int, nexts: Logprobs, finish: FinishReason | None) -> "Beam":
        """By the token of this rank, from 1."""
        token_id, logprob = nexts.top[rank - 1]
        return Beam(
            (*self.token_ids, token_id),
            (*self.logprobs, Logprobs(logprob, rank, nexts.top)),
            self.cumulative_logprob + logprob,
            finish,
        )


class BeamSearch:
    """Of one prompt: while not `is_over`, find what may follow each of `beams`, and `advance`."""

    def __init__(self, params: BeamSearchParams, eos_token_ids: Collection[int]) -> None:
        self.beams: list[Beam] = [Beam()]
        self.results: list[Beam] = []  # best first, at most `beam_width`
        self._params = params
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        # A beam's likeliest tokens: `beam_width` of them do not end it.
        self.num_logprobs = min(params.beam_width + len(self._eos), MAX_LOGPROBS)

    def next_params(self) -> SamplingParams:
        """Of a request for what may follow a beam: the first token's log-probabilities are it."""
        return SamplingParams(
            temperature=0.0,
            seed=0,
            max_tokens=1,
            logprobs=self.num_logprobs,
            processed_logprobs=True,
            allowed_token_ids=self._params.allowed_token_ids,  # type: ignore[arg-type]
        )

    @property
    def is_over(self) -> bool:
        if not self.beams:
            return True
        if len(self.results) < self._params.beam_width:
            return False
        return self._score(self.beams[0]) <= self._score(self.results[-1])

    def advance(self, nexts: Sequence[Logprobs]) -> None:
        """
        Args:
            nexts: per beam, `top` has the `num_logprobs` likeliest next tokens.
        """
        params = self._params
        ranked = [
            beam.extended(rank, logprobs, self._finish(beam, token_id))
            for beam, logprobs in zip(self.beams, nexts, strict=True)
            for rank, (token_id, _) in enumerate(logprobs.top, 1)
        ]
        ranked.sort(key=lambda beam: -beam.cumulative_logprob)
        finished = [beam for beam in ranked[: params.beam_width] if beam.finish_reason is not None]
        self.results = sorted([*self.results, *finished], key=lambda beam: -self._score(beam))
        del self.results[params.beam_width :]
        running = [beam for beam in ranked if beam.finish_reason is None]
        self.beams = running[: params.beam_width]

    def _finish(self, beam: Beam, token_id: int) -> FinishReason | None:
        if token_id in self._eos:
            return FinishReason.STOP
        is_long = len(beam.token_ids) + 1 >= self._params.max_tokens
        return FinishReason.LENGTH if is_long else None

    def _score(self, beam: Beam) -> float:
        return beam.score(self._params.length_penalty)
