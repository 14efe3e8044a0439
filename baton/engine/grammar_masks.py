"""Structured output in the engine: one matcher per sequence, one mask per row and step."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher

from baton.engine.batch import SampleRequest
from baton.engine.constraints import ByIdentity
from baton.errors import InvalidRequest
from baton.grammar import Grammars
from baton.kernels.logit_masks import Bits, num_words
from baton.types import StructuredOutput

MAX_REMEMBERED = 1024  # sequences; a forgotten one is replayed


@dataclass(slots=True)
class _Matching:
    """How far a matcher has come in a sequence's output."""

    spec: StructuredOutput
    matcher: LLMatcher
    num_consumed: int = 0

    def is_of(self, spec: StructuredOutput, output: Seq[int]) -> bool:
        """Whether it can go on for this output, of which it has seen the beginning."""
        return self.spec is spec and self.num_consumed <= len(output)

    def catch_up(self, output: Seq[int]) -> bool:
        """False: the output does not fit, or the grammar is too complex to say."""
        new = list(output[self.num_consumed :])
        self.num_consumed += len(new)
        return not new or self.matcher.consume_tokens(new)


@dataclass(frozen=True, slots=True)
class GrammarMask:
    """What may come next in `row`; `ends`: nothing but EOS. `bits` are None when that cannot be
    said."""

    row: int
    bits: Bits | None
    ends: bool = False


class GrammarMasks:
    """Follows the output of the sequences that it saw last. A matcher counts from the start of the
    output, so one that is made anew (after a preemption, on another worker) is where the old one
    was."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._matchings: ByIdentity[Seq[int], _Matching] = ByIdentity(MAX_REMEMBERED)
        self._executor: LLExecutor | None = None

    def masks(self, jobs: Seq[tuple[int, SampleRequest]], vocab_size: int) -> list[GrammarMask]:
        """One per job (row, request); each request has structured output."""
        bits = np.zeros((len(jobs), num_words(vocab_size)), np.int32)
        requests = [request for _, request in jobs]
        matchers = self._fill(dict(enumerate(requests)), bits)
        if len(matchers) < len(jobs):
            # Copies of a grammar share its lexer, whose limits others may have used up.
            failed = {at: r for at, r in enumerate(requests) if at not in matchers}
            for request in failed.values():
                self._forget(request)
            matchers |= self._fill(failed, bits)
        return [
            GrammarMask(row, bits[at], matchers[at].is_stopped())
            if at in matchers
            else GrammarMask(row, None)
            for at, (row, _) in enumerate(jobs)
        ]

    def _fill(self, requests: Mapping[int, SampleRequest], bits: Bits) -> dict[int, LLMatcher]:
        """Fill bits[at] for every request; the matchers of those where that worked."""
        found = {at: self._follow(request) for at, request in requests.items()}
        live = [(matcher, at) for at, matcher in found.items() if matcher is not None]
        if len(live) == 1:
            ((matcher, at),) = live
            words = bits[at]
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        elif live:
            self._executor = self._executor or LLExecutor()
            address, row_bytes = bits.ctypes.data, bits.strides[0]
            self._executor.unsafe_compute_mask_ptr(live, address, row_bytes, len(bits))
        return {at: matcher for matcher, at in live if not matcher.is_error()}

    def _follow(self, request: SampleRequest) -> LLMatcher | None:
        """The matcher behind all of the request's output; None when there is none."""
        spec, output = request.params.structured_outputs, request.output_token_ids
        assert spec is not None, "a request with structured output"
        matching = self._matchings.get(output)
        if matching is None or not matching.is_of(spec, output):
            if self._grammars is None:
                return None
            try:
                matcher = self._grammars.matcher(spec)
            except InvalidRequest:
                return None
            matching = self._matchings.put(output, _Matching(spec, matcher))
        return matching.matcher if matching.catch_up(output) else None

    def _forget(self, request: SampleRequest) -> None:
        spec = request.params.structured_outputs
        self._matchings.drop(request.output_token_ids)
        if self._grammars is not None and spec is not None:
            self._grammars.forget(spec)
