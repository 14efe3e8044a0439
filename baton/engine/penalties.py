"""Repetition, presence and frequency penalties, and the mask that keeps a choice from ending early.

All of them edit few logits of a row: those of tokens that the prompt or the output has.
"""

from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.batch import SampleRequest
from baton.types import SamplingParams


class TokenCounts:
    """The distinct tokens of prompt ‖ output, and how often each is in the output.

    Each step counts only what the output has grown by.
    """

    def __init__(self, prompt: Seq[int], output: Seq[int]) -> None:
        self.prompt, self.output = prompt, output
        distinct = np.unique(np.fromiter(prompt, np.int64, len(prompt)))
        self._slots = {token_id: slot for slot, token_id in enumerate(distinct.tolist())}
        self._ids: npt.NDArray[np.int64] = distinct
        self._counts = np.zeros(len(distinct), np.float32)
        self._num_counted = 0
        self.catch_up()

    def is_of(self, request: SampleRequest) -> bool:
        """Whether these counts can go on for `request`: the same two sequences, the output at most
        appended to."""
        if self.prompt is not request.prompt_token_ids:
            return False
        if self.output is not request.output_token_ids:
            return False
        return self._num_counted <= len(self.output)

    def catch_up(self) -> None:
        for token_id in self.output[self._num_counted :]:
            slot = self._slots.setdefault(token_id, len(self._slots))
            if slot == len(self._ids):
                self._grow()
            self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_counted = len(self.output)

    def _grow(self) -> None:
        spare = max(len(self._ids), 64)
        self._ids = np.concatenate((self._ids, np.zeros(spare, np.int64)))
        self._counts = np.concatenate((self._counts, np.zeros(spare, np.float32)))

    def penalize(self, row: Tensor, params: SamplingParams) -> None:
        """Edit `row`, [vocab_size] float32, in place."""
        size = len(self._slots)
        ids = torch.from_numpy(self._ids[:size]).to(row.device)
        counts = torch.from_numpy(self._counts[:size]).to(row.device)
        values = row[ids]
        if params.repetition_penalty != 1:
            penalty = params.repetition_penalty
            values = torch.where(values > 0, values / penalty, values * penalty)
        values -= params.frequency_penalty * counts
        values -= params.presence_penalty * (counts > 0)
        row[ids] = values


class Penalties:
    """Edits rows; remembers the counts of the sequences that it saw last."""

    def __init__(self, eos_token_ids: Collection[int], max_cached: int = 1024) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_cached = max_cached
        # By identity of the output, which the entry keeps alive.
        self._cache: OrderedDict[int, TokenCounts] = OrderedDict()

    def applies(self, request: SampleRequest) -> bool:
        return _has_penalties(request.params) or _is_short(request)

    def apply(self, row: Tensor, request: SampleRequest) -> None:
        """Edit `row`, [vocab_size] float32, in place: repetition, then frequency, then presence
        penalty, then the mask."""
        if _has_penalties(request.params):
            self._counts(request).penalize(row, request.params)
        if _is_short(request):
            row[self._ending_ids(request.params, len(row))] = -torch.inf

    def _counts(self, request: SampleRequest) -> TokenCounts:
        key = id(request.output_token_ids)
        counts = self._cache.pop(key, None)
        if counts is None or not counts.is_of(request):
            counts = TokenCounts(request.prompt_token_ids, request.output_token_ids)
        counts.catch_up()
        self._cache[key] = counts
        if len(self._cache) > self._max_cached:
            self._cache.popitem(last=False)
        return counts

    def _ending_ids(self, params: SamplingParams, vocab_size: int) -> list[int]:
        ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            ids |= self._eos_token_ids
        return [token_id for token_id in ids if 0 <= token_id < vocab_size]


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
    )


def _is_short(request: SampleRequest) -> bool:
    return len(request.output_token_ids) < request.params.min_tokens
