"""What the engine knows of a request: a `Leg` and its `Sequence`s, the only mutable state there is.

A leg starts as a *trunk*, one sequence that stands for the prompt, and forks into one *branch* per
open choice when the prompt's KV is there (a local leg with a single choice is a branch from the
start). Of a sequence's tokens, prompt ‖ output:

    0 ───────────── num_computed_tokens ───────────── num_tokens
      KV in the pool                     still to run           the next one to sample
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import IntEnum

from baton.hashing import next_hash
from baton.types import HASH_TOKENS, BlockHash, BlockId, FinishReason, LegId, Request

Order = tuple[int, float, int, int]  # priority, deadline, arrival, choice; smaller runs first


class SequenceStatus(IntEnum):
    """Where a sequence stands; everything from FINISHED_STOPPED on is over."""

    WAITING = 1  # for a seat in the batch, and for blocks unless it has them
    WAITING_FOR_KV = 2  # its blocks are being filled by a transfer
    RUNNING = 3
    HELD = 4  # computed; its blocks are kept for whoever fetches them
    PREEMPTED = 5  # waits again, without blocks
    FINISHED_STOPPED = 6
    FINISHED_LENGTH = 7
    FINISHED_ABORTED = 8
    FINISHED_FAILED = 9

    @property
    def is_finished(self) -> bool:
        return self >= SequenceStatus.FINISHED_STOPPED


FINISHED: dict[FinishReason, SequenceStatus] = {
    FinishReason.STOP: SequenceStatus.FINISHED_STOPPED,
    FinishReason.LENGTH: SequenceStatus.FINISHED_LENGTH,
    FinishReason.REPETITION: SequenceStatus.FINISHED_STOPPED,
}


class LegKind(IntEnum):
    PREFILL = 1
    DECODE = 2  # until its KV is there; LOCAL if it is told to compute it here
    LOCAL = 3


@dataclass(slots=True, eq=False)
class Leg:
    """One request on this worker."""

    leg_id: LegId
    kind: LegKind
    request: Request
    priority: int
    deadline_s: float  # on the engine's clock, or 0 when deadlines do not order
    arrival: int
    root: BlockHash
    open_choices: set[int]  # neither finished (here) nor aborted
    trunk: "Sequence | None" = None  # until the fork
    branches: "dict[int, Sequence]" = field(default_factory=dict)
    is_admitted: bool = False  # told by LegAdmitted or KVReserved
    is_exposed: bool = False  # a transfer may touch its blocks, since it is admitted
    has_emitted: bool = False  # told a token
    is_retained: bool = False
    num_fetch_tokens: int = 0  # prompt tokens that may be fetched instead of computed; once
    num_fetched_tokens: int = 0  # of a DECODE leg: `shared_token_ids` whose KV is to be written
    num_scored_tokens: int = 0  # leading prompt tokens whose log-probabilities are told
    num_verified_tokens: int = 0  # of these: known to be good
    _seeds: dict[int, int] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def is_to_be_scored(self) -> bool:
        """Log-probabilities of its prompt are asked for, and not told to the end. The first token
        has none."""
        if self.kind is not LegKind.LOCAL or self.request.sampling.prompt_logprobs is None:
            return False
        return self.num_scored_tokens < self.num_prompt_tokens and self.num_prompt_tokens > 1

    def sequences(self) -> "list[Sequence]":
        return [self.trunk] if self.trunk is not None else list(self.branches.values())

    def order(self, choice: int) -> Order:
        return (self.priority, self.deadline_s, self.arrival, choice)

    def seed(self, choice: int) -> int:
        """32 bits. Greedy requests may come without a seed: nothing is drawn for them."""
        if choice not in self._seeds:
            sampling = self.request.sampling
            self._seeds[choice] = 0 if sampling.seed is None else sampling.choice_seed(choice)
        return self._seeds[choice]


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a leg, or its trunk (`choice` then only serves the order)."""

    seq_id: int
    leg: Leg
    choice: int
    output_token_ids: list[int] = field(default_factory=list)
    block_ids: list[BlockId] = field(default_factory=list)
    reserve: list[BlockId] = field(default_factory=list)  # allotted, not yet in the table
    hashes: list[BlockHash] = field(default_factory=list)  # one per HASH_TOKENS, as far as known
    num_computed_tokens: int = 0
    num_published_blocks: int = 0  # leading blocks that the prefix cache has been told of
    status: SequenceStatus = SequenceStatus.WAITING
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        self.order = self.leg.order(self.choice)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.leg.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.leg.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        num_prompt = len(self.leg.request.prompt_token_ids)
        return num_prompt + len(self.output_token_ids) - self.num_computed_tokens

    @property
    def is_trunk(self) -> bool:
        return self.leg.trunk is self

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is to run, and that is an output token."""
        return bool(self.output_token_ids) and self.num_uncomputed_tokens == 1

    def tokens(self, start: int, stop: int) -> Seq[int]:
        """Ids [start, stop) of prompt ‖ output."""
        prompt = self.leg.request.prompt_token_ids
        num_prompt = len(prompt)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        if stop <= num_prompt:
            return prompt[start:stop]
        return (*prompt[start:], *self.output_token_ids[: stop - num_prompt])

    def hash_known(self) -> None:
        """Extend `hashes` over every full run of HASH_TOKENS known tokens."""
        parent = self.hashes[-1] if self.hashes else self.leg.root
        while (start := len(self.hashes) * HASH_TOKENS) + HASH_TOKENS <= self.num_tokens:
            parent = next_hash(parent, self.tokens(start, start + HASH_TOKENS))
            self.hashes.append(parent)

    def block_hashes(self, index: int, per_block: int) -> tuple[BlockHash, ...]:
        """The `per_block` hashes that end inside block `index`, all of whose tokens are known."""
        stop = (index + 1) * per_block
        if len(self.hashes) < stop:
            self.hash_known()
        return tuple(self.hashes[stop - per_block : stop])
