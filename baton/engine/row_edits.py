"""Everything that happens to a row of logits before a token is drawn from it, in the fixed order of
docs/sampling.md: masks → bias → penalties. All rows that need the same edit get it at once; a row
that needs none is not touched, and costs nothing."""

from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from baton.engine.batch import SampleRequest
from baton.engine.constraints import ByIdentity, Constraints, is_constrained
from baton.engine.penalties import TokenCounts, has_penalties, penalize
from baton.kernels.logit_masks import mask_rows
from baton.types import SamplingParams

MAX_REMEMBERED = 1024  # requests and sequences; what is forgotten is worked out again


class RowEdits:
    """Edits rows; remembers what it worked out for the requests and sequences that it saw last."""

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._constraints: ByIdentity[SamplingParams, Constraints] = ByIdentity(MAX_REMEMBERED)
        self._counts: ByIdentity[Seq[int], TokenCounts] = ByIdentity(MAX_REMEMBERED)

    def applies(self, request: SampleRequest) -> bool:
        params = request.params
        return has_penalties(params) or is_constrained(params, len(request.output_token_ids))

    def apply(self, logits: Tensor, requests: Seq[SampleRequest]) -> None:
        """Edit in place.

        Args:
            logits: [len(requests), vocab_size] float32, contiguous.
        """
        vocab_size = logits.shape[1]
        constrained = [
            (row, request, self._constraints_of(request.params, vocab_size))
            for row, request in enumerate(requests)
            if is_constrained(request.params, len(request.output_token_ids))
        ]
        self._mask(logits, constrained)
        _ban(logits, constrained)
        _add_bias(logits, [(row, one) for row, _, one in constrained if len(one.bias_ids)])
        jobs = [
            (row, self._counts_of(request), request.params)
            for row, request in enumerate(requests)
            if has_penalties(request.params)
        ]
        if jobs:
            penalize(logits, jobs)

    def _mask(
        self, logits: Tensor, constrained: Seq[tuple[int, SampleRequest, Constraints]]
    ) -> None:
        masks = [(row, one.allowed) for row, _, one in constrained if one.allowed is not None]
        if masks:
            mask_rows(logits, [row for row, _ in masks], np.stack([bits for _, bits in masks]))

    def _constraints_of(self, params: SamplingParams, vocab_size: int) -> Constraints:
        found = self._constraints.get(params)
        if found is None:
            made = Constraints(params, self._eos_token_ids, vocab_size)
            found = self._constraints.put(params, made)
        return found

    def _counts_of(self, request: SampleRequest) -> TokenCounts:
        prompt, output = request.prompt_token_ids, request.output_token_ids
        counts = self._counts.get(output)
        if counts is None or not counts.is_of(prompt, output):
            counts = self._counts.put(output, TokenCounts(prompt, output))
        counts.catch_up()
        return counts


def _ban(logits: Tensor, constrained: Seq[tuple[int, SampleRequest, Constraints]]) -> None:
    vocab_size = logits.shape[1]
    places = [
        row * vocab_size + token_id
        for row, request, one in constrained
        for token_id in one.banned(request.output_token_ids, may_end=False)
    ]
    if places:
        logits.view(-1)[torch.tensor(places, device=logits.device)] = -torch.inf


def _add_bias(logits: Tensor, jobs: Seq[tuple[int, Constraints]]) -> None:
    if not jobs:
        return
    vocab_size = logits.shape[1]
    places = np.concatenate([row * vocab_size + one.bias_ids for row, one in jobs])
    values = np.concatenate([one.bias_values for _, one in jobs])
    where = torch.from_numpy(places).to(logits.device)
    logits.view(-1)[where] += torch.from_numpy(values).to(logits.device)
