"""One step while it is put together."""

from dataclasses import dataclass, field

from baton.engine.batch import Batch, SampleRequest, ScheduledRow, Scoring
from baton.engine.sequence import Leg, LegKind, Sequence
from baton.types import BlockId


@dataclass(slots=True)
class Step:
    """One step while it is put together; `rows[i]` belongs to `seqs[i]`."""

    budget: int  # tokens left
    rows: list[ScheduledRow] = field(default_factory=list)
    seqs: list[Sequence] = field(default_factory=list)
    copies: list[tuple[BlockId, BlockId]] = field(default_factory=list)
    seq_ids: set[int] = field(default_factory=set)
    num_decodes: int = 0
    context_tokens: int = 0  # of the decodes
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0  # context that the prefill tokens find in the pool

    def batch(self) -> Batch:
        return Batch(tuple(self.rows), tuple(self.copies))

    def add(self, seq: Sequence, start: int, stop: int) -> None:
        """Run tokens [start, stop) of `seq`, and sample from the last one if no more is known."""
        if seq.is_decoding:
            self.num_decodes += 1
            self.context_tokens += stop
        else:
            self.num_prefill_tokens += stop - start
            self.num_cached_tokens += start
        samples = _samples(seq) if stop == seq.num_tokens else ()
        token_ids = seq.tokens(start, stop)
        scoring = _scoring(seq, start, stop)
        row = ScheduledRow(seq.seq_id, token_ids, start, seq.block_ids, samples, scoring)
        self.rows.append(row)
        self.seqs.append(seq)
        self.seq_ids.add(seq.seq_id)
        self.budget -= stop - start


def _scoring(seq: Sequence, start: int, stop: int) -> Scoring | None:
    """Of the prompt tokens that follow tokens [start, stop)."""
    num_top = seq.leg.request.sampling.prompt_logprobs
    if num_top is None or not seq.leg.is_to_be_scored:
        return None
    targets = seq.leg.request.prompt_token_ids[start + 1 : stop + 1]
    return Scoring(targets, num_top) if targets else None


def _samples(seq: Sequence) -> tuple[SampleRequest, ...]:
    """For the trunk of a leg: one per choice that has no token yet."""
    leg, request = seq.leg, seq.leg.request
    if not seq.is_trunk:
        return (_sample(leg, seq.choice, seq.output_token_ids),)
    prefill = leg.kind is LegKind.PREFILL
    return tuple(
        _sample(leg, choice, [])
        for choice in sorted(leg.open_choices)
        if prefill or not request.committed(choice)
    )


def _sample(leg: Leg, choice: int, output: list[int]) -> SampleRequest:
    request = leg.request
    prompt = request.prompt_token_ids
    position = len(prompt) + len(output)
    return SampleRequest(choice, leg.seed(choice), position, request.sampling, prompt, output)
