"""Repetition, presence and frequency penalties: they edit the logits of tokens that the prompt or
the output has."""

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.types import SamplingParams


class TokenCounts:
    """The distinct tokens of prompt ‖ output, and how often each is in the output.

    Each step counts only what the output has grown by.
    """

    def __init__(self, prompt: Seq[int], output: Seq[int]) -> None:
        self._prompt, self._output = prompt, output
        distinct = np.unique(np.fromiter(prompt, np.int64, len(prompt)))
        self._slots = {token_id: slot for slot, token_id in enumerate(distinct.tolist())}
        self._ids: npt.NDArray[np.int64] = distinct
        self._counts = np.zeros(len(distinct), np.float32)
        self._num_counted = 0
        self.catch_up()

    def is_of(self, prompt: Seq[int], output: Seq[int]) -> bool:
        """Whether these counts can go on for this sequence: the same two lists, the output at most
        appended to."""
        is_same = self._prompt is prompt and self._output is output
        return is_same and self._num_counted <= len(output)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self._counts[: len(self._slots)]

    def catch_up(self) -> None:
        for token_id in self._output[self._num_counted :]:
            slot = self._slots.setdefault(token_id, len(self._slots))
            if slot == len(self._ids):
                self._grow()
            self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_counted = len(self._output)

    def _grow(self) -> None:
        spare = max(len(self._ids), 64)
        self._ids = np.concatenate((self._ids, np.zeros(spare, np.int64)))
        self._counts = np.concatenate((self._counts, np.zeros(spare, np.float32)))


def has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
    )


def penalize(logits: Tensor, jobs: Seq[tuple[int, TokenCounts, SamplingParams]]) -> None:
    """Edit rows in place: repetition, then frequency, then presence penalty; all rows at once.

    Args:
        logits: [num_rows, vocab_size] float32, contiguous.
        jobs: row, its counts and its parameters; rows are distinct.
    """
    sizes = [len(counts.ids) for _, counts, _ in jobs]
    ids = np.concatenate([counts.ids for _, counts, _ in jobs])
    places = np.repeat([row * logits.shape[1] for row, _, _ in jobs], sizes) + ids
    columns = [np.concatenate([counts.counts for _, counts, _ in jobs])] + [
        np.repeat(np.array([getattr(params, name) for _, _, params in jobs], np.float32), sizes)
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    ]
    where = torch.from_numpy(places).to(logits.device)
    times, repetition, frequency, presence = torch.from_numpy(np.stack(columns)).to(logits.device)
    flat = logits.view(-1)
    values = flat[where]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * times
    values -= presence * (times > 0)
    flat[where] = values
