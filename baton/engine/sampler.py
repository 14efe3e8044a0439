"""From logits to tokens, in the fixed order of docs/sampling.md:

penalties → min_tokens mask → (log-probabilities are of this) → temperature → top-k → top-p → min-p
→ the largest of logit / temperature + noise.
"""

from collections.abc import Collection
from collections.abc import Sequence as Seq

from torch import Tensor

from baton.engine.batch import Sampled, SampleRequest
from baton.engine.penalties import Penalties
from baton.kernels.logprobs import Wanted, token_logprobs
from baton.kernels.sampling import Draw, draw_tokens, noise_key
from baton.types import Logprobs


class Sampler:
    """Samples every row by itself: what a row gets does not depend on the rest of the batch."""

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        """`eos_token_ids`: masked while a choice has fewer than `min_tokens` tokens."""
        self._penalties = Penalties(eos_token_ids)

    def sample(
        self, logits: Tensor, requests: Seq[tuple[SampleRequest, ...]]
    ) -> list[tuple[Sampled, ...]]:
        """One token per request.

        Args:
            logits: [num_rows, vocab_size], any float dtype, read only.
            requests: per row; the choices of one prompt share its row.

        Returns: per row, one Sampled per request, in order. Where the largest logit of a row is not
            finite, token_id is -1.
        """
        logits = logits.float().contiguous()
        flat = [(row, request) for row, group in enumerate(requests) for request in group]
        edited = [index for index, (_, r) in enumerate(flat) if self._penalties.applies(r)]
        plain = sorted(set(range(len(flat))) - set(edited))
        results: dict[int, Sampled] = {}
        results.update(_sample(logits, plain, [flat[i] for i in plain]))
        if edited:
            rows = logits[[flat[i][0] for i in edited]]
            for row, index in zip(rows, edited, strict=True):
                self._penalties.apply(row, flat[index][1])
            jobs = [(row, flat[index][1]) for row, index in enumerate(edited)]
            results.update(_sample(rows, edited, jobs))
        in_order = iter(range(len(flat)))
        return [tuple(results[next(in_order)] for _ in group) for group in requests]


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


def _logprobs(
    logits: Tensor, jobs: Seq[tuple[int, SampleRequest]], token_ids: Seq[int]
) -> dict[int, Logprobs]:
    """Index of the job → its log-probabilities, for those who want them and have a token."""
    wanted = {
        at: Wanted(row, token_id, request.params.logprobs)
        for at, ((row, request), token_id) in enumerate(zip(jobs, token_ids, strict=True))
        if request.params.logprobs is not None and token_id >= 0
    }
    return dict(zip(wanted, token_logprobs(logits, list(wanted.values())), strict=True))
