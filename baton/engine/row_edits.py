"""Everything that happens to a row of logits before a token is drawn from it, in the fixed order of
docs/sampling.md: masks → bias → penalties. All rows that need the same edit get it at once; a row
that needs none is not touched, and costs nothing."""

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from baton.engine.batch import SampleRequest
from baton.engine.constraints import ByIdentity, Constraints, is_constrained
from baton.engine.grammar_masks import GrammarMask, GrammarMasks
from baton.engine.penalties import TokenCounts, has_penalties, penalize
from baton.grammar import Grammars
from baton.kernels.logit_masks import Bits, mask_rows
from baton.types import SamplingParams

Job = tuple[int, SampleRequest, Constraints]  # the row first

MAX_REMEMBERED = 1024  # requests and sequences; what is forgotten is worked out again


class RowEdits:
    """Edits rows; remembers what it worked out for the requests and sequences that it saw last."""

    def __init__(self, eos_token_ids: Collection[int], grammars: Grammars | None = None) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._grammar = GrammarMasks(grammars)
        self._constraints: ByIdentity[SamplingParams, Constraints] = ByIdentity(MAX_REMEMBERED)
        self._counts: ByIdentity[Seq[int], TokenCounts] = ByIdentity(MAX_REMEMBERED)

    def applies(self, request: SampleRequest) -> bool:
        params = request.params
        return has_penalties(params) or is_constrained(params, len(request.output_token_ids))

    def apply(self, logits: Tensor, requests: Seq[SampleRequest]) -> frozenset[int]:
        """Edit in place.

        Args:
            logits: [len(requests), vocab_size] float32, contiguous.

        Returns: rows whose grammar cannot say what comes next; they are left as they were.
        """
        vocab_size = logits.shape[1]
        constrained = [
            (row, request, self._constraints_of(request.params, vocab_size))
            for row, request in enumerate(requests)
            if is_constrained(request.params, len(request.output_token_ids))
        ]
        structured = [
            (row, request)
            for row, request, _ in constrained
            if request.params.structured_outputs is not None
        ]
        masks = {mask.row: mask for mask in self._grammar.masks(structured, vocab_size)}
        _mask(logits, constrained, masks)
        _ban(logits, constrained, masks)
        _add_bias(logits, [(row, one) for row, _, one in constrained if len(one.bias_ids)])
        jobs = [
            (row, self._counts_of(request), request.params)
            for row, request in enumerate(requests)
            if has_penalties(request.params)
        ]
        if jobs:
            penalize(logits, jobs)
        return frozenset(row for row, mask in masks.items() if mask.bits is None)

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


def _mask(logits: Tensor, constrained: Seq[Job], masks: Mapping[int, GrammarMask]) -> None:
    """What a grammar and `allowed_token_ids` leave; both, if a row has both."""
    found: list[tuple[int, Bits]] = []
    for row, _, one in constrained:
        sets = [one.allowed, masks[row].bits if row in masks else None]
        given = [bits for bits in sets if bits is not None]
        if given:
            found.append((row, np.bitwise_and.reduce(given)))
    if found:
        mask_rows(logits, [row for row, _ in found], np.stack([bits for _, bits in found]))


def _ban(logits: Tensor, constrained: Seq[Job], masks: Mapping[int, GrammarMask]) -> None:
    vocab_size = logits.shape[1]
    places = [
        row * vocab_size + token_id
        for row, request, one in constrained
        for token_id in one.banned(
            request.output_token_ids, may_end=row in masks and masks[row].ends
        )
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
