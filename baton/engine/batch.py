"""The scheduler's order to the runner, and the runner's answer."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from baton.types import BlockId, Logprobs, SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Sample one token from the logits of a row's last scheduled token.

    `position` = index of the new token in prompt + output; the noise depends on (seed, position,
    token id) alone.
    """

    choice: int
    seed: int  # 32 bits, of this choice
    position: int
    params: SamplingParams
    prompt_token_ids: Seq[int]  # for the repetition penalty
    output_token_ids: Seq[int]  # so far, for penalties and min_tokens


@dataclass(frozen=True, slots=True)
class Scoring:
    """Say how likely the known tokens were: token_ids[i] is what follows the row's i-th token."""

    token_ids: Seq[int]
    num_top: int  # the likeliest tokens at each place, too


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One sequence's share of a step: tokens [start, start + len(token_ids)) of prompt + output.

    After the step their KV is in slots block_ids[i // block_size] * block_size + i % block_size.
    `samples` is empty while more of the prompt (or of committed output) is to come; it holds one
    entry per choice when a prefill ends. `row_id` stays the same for the life of a sequence.
    Sequences in here may be the scheduler's own lists: read them before `run` returns, never keep
    them.
    """

    row_id: int
    token_ids: Seq[int]
    start: int
    block_ids: Seq[BlockId]
    samples: tuple[SampleRequest, ...]
    scoring: Scoring | None = None

    @property
    def num_answers(self) -> int:
        return (len(self.scoring.token_ids) if self.scoring else 0) + len(self.samples)

    @property
    def num_context_tokens(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `copies` (source block, target block) are done before anything is computed (copy on
    write): every source is read before any target is written. Targets are distinct."""

    rows: tuple[ScheduledRow, ...]
    copies: tuple[tuple[BlockId, BlockId], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


NOT_FINITE = -1  # in place of a token id: the row's logits were not finite
NOTHING_ALLOWED = -2  # the request's own constraints leave no token
GRAMMAR_FAILED = -3  # the output so far does not fit its grammar, or that got too complex


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_id is negative when there is no token, and says why."""

    token_id: int
    logprobs: Logprobs | None = None


OnLayers = Callable[[int], None]


class Runner(Protocol):
    """Computes a batch: writes KV, samples. Raises on a fault that fails the whole step."""

    def run(
        self, batch: Batch, on_layers: OnLayers | None = None
    ) -> dict[int, tuple[Sampled, ...]]:
        """row_id → one Sampled (with logprobs) per token of the row's `scoring`, then one per entry
        of its `samples`, in order. Rows with neither are absent, unless what they computed is not
        finite: then they have one Sampled(NOT_FINITE).

        Only the runner knows when KV that it computes may be read, so it says so, at its leisure:
        `on_layers(n)` promises that the new KV of every row is in the pool, finite, in the layers
        [0, n), and that nothing of it changes before `run` returns. From any thread, n ascending,
        never after `run`; it does not block. A layer that is on its way (a kernel that was
        launched, not finished) is not there. Saying nothing is always right.
        """
        ...
