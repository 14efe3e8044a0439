"""From logits to tokens, in the fixed order of docs/sampling.md:

masks → bias → penalties → temperature → top-k → top-p → min-p → the largest of
logit / temperature + noise. Log-probabilities are of the logits before any of it.
"""

import math
from collections.abc import Collection
from collections.abc import Sequence as Seq

from torch import Tensor

from baton.engine.batch import (
    GRAMMAR_FAILED,
    NOT_FINITE,
    NOTHING_ALLOWED,
    Sampled,
    SampleRequest,
)
from baton.engine.row_edits import RowEdits
from baton.grammar import Grammars
from baton.kernels.logprobs import Wanted, token_logprobs
from baton.kernels.sampling import Draw, draw_tokens, noise_key
from baton.types import Logprobs


class Sampler:
    """Samples every row by itself: what a row gets does not depend on the rest of the batch."""

    def __init__(self, eos_token_ids: Collection[int], grammars: Grammars | None = None) -> None:
        """
        Args:
            eos_token_ids: masked while a choice has fewer than `min_tokens` tokens.
            grammars: None: requests with structured output fail.
        """
        self._edits = RowEdits(eos_token_ids, grammars)

    def sample(
        self, logits: Tensor, requests: Seq[tuple[SampleRequest, ...]]
    ) -> list[tuple[Sampled, ...]]:
        """One token per request.

        Args:
            logits: [num_rows, vocab_size], any float dtype, read only.
            requests: per row; the choices of one prompt share its row.

        Returns: per row, one Sampled per request, in order.
        """
        logits = logits.float().contiguous()
        flat = [(row, request) for row, group in enumerate(requests) for request in group]
        edited = [index for index, (_, r) in enumerate(flat) if self._edits.applies(r)]
        plain = sorted(set(range(len(flat))) - set(edited))
        results: dict[int, Sampled] = {}
        results.update(_sample(logits, plain, [flat[i] for i in plain]))
        if edited:
            results.update(self._sample_edited(logits, edited, [flat[i] for i in edited]))
        in_order = iter(range(len(flat)))
        return [tuple(results[next(in_order)] for _ in group) for group in requests]

    def _sample_edited(
        self, logits: Tensor, indices: Seq[int], jobs: Seq[tuple[int, SampleRequest]]
    ) -> dict[int, Sampled]:
        """`_sample`, from copies that the requests' edits are applied to."""
        rows = logits[[row for row, _ in jobs]]
        lost = self._edits.apply(rows, [request for _, request in jobs])
        copies = [(at, request) for at, (_, request) in enumerate(jobs)]
        token_ids = draw_tokens(rows, [_draw(*copy) for copy in copies])
        logprobs = {
            **_logprobs(logits, jobs, token_ids, processed=False),
            **_logprobs(rows, copies, token_ids, processed=True),
        }
        results: dict[int, Sampled] = {}
        for at, (index, (row, _)) in enumerate(zip(indices, jobs, strict=True)):
            results[index] = _checked(Sampled(token_ids[at], logprobs.get(at)))
            if at in lost:
                results[index] = Sampled(GRAMMAR_FAILED)
            elif results[index].token_id == NOT_FINITE and logits[row].amax().isfinite():
                results[index] = Sampled(NOTHING_ALLOWED)
        return results


def _sample(
    logits: Tensor, indices: Seq[int], jobs: Seq[tuple[int, SampleRequest]]
) -> dict[int, Sampled]:
    """indices[i] → the result of jobs[i], a row of `logits` and what to sample from it."""
    token_ids = draw_tokens(logits, [_draw(row, request) for row, request in jobs])
    logprobs = _logprobs(logits, jobs, token_ids)
    return {
        index: Sampled(token_id, logprobs.get(at))
        for at, (index, token_id) in enumerate(zip(indices, token_ids, strict=True))
    }


def _draw(row: int, request: SampleRequest) -> Draw:
    params = request.params
    return Draw(
        row=row,
        key=noise_key(request.seed, request.position),
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
    )


def _checked(sampled: Sampled) -> Sampled:
    """Masks may hide a logit that is not finite from the draw, but not from log-probabilities."""
    if sampled.logprobs is None or math.isfinite(sampled.logprobs.logprob):
        return sampled
    return Sampled(NOT_FINITE)


def _logprobs(
    logits: Tensor,
    jobs: Seq[tuple[int, SampleRequest]],
    token_ids: Seq[int],
    *,
    processed: bool | None = None,
) -> dict[int, Logprobs]:
    """Index of the job → its log-probabilities, for those who want them and have a token.

    Args:
        processed: only for those who want them of edited logits, or only for the others.
    """
    wanted = {
        at: Wanted(row, token_id, request.params.logprobs, request.params.logprob_token_ids)
        for at, ((row, request), token_id) in enumerate(zip(jobs, token_ids, strict=True))
        if request.params.logprobs is not None
        and processed in (None, request.params.processed_logprobs)
        and token_id >= 0
    }
    return dict(zip(wanted, token_logprobs(logits, list(wanted.values())), strict=True))
