"""Batches by hand, for a runner without an engine."""

from collections.abc import Sequence

from torch import Tensor

from baton.engine.batch import Batch, SampleRequest, ScheduledRow
from baton.engine.runner import ModelRunner
from baton.types import BlockId, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def row(
    token_ids: Sequence[int],
    start: int = 0,
    *,
    first_block: int = 0,
    block_ids: Sequence[int] | None = None,
    row_id: int = 0,
    sample: bool = False,
) -> ScheduledRow:
    """Tokens at [start, …) in blocks first_block, first_block + 1, … unless `block_ids` says."""
    blocks = range(first_block, first_block + 64) if block_ids is None else block_ids
    end = start + len(token_ids)
    samples = (SampleRequest(0, 1, end, GREEDY, token_ids, ()),) if sample else ()
    return ScheduledRow(row_id, token_ids, start, [BlockId(block) for block in blocks], samples)


def hidden_states(runner: ModelRunner, *rows: ScheduledRow) -> Tensor:
    """[num_tokens, hidden_size] of all rows' tokens in one step."""
    return runner.hidden_states(Batch(rows))


def chunked(
    runner: ModelRunner, prompt: Sequence[int], chunks: Sequence[int], first_block: int = 0
) -> list[Tensor]:
    """The prompt in steps of these sizes; the hidden states of each."""
    assert sum(chunks) == len(prompt)
    parts, start = [], 0
    for size in chunks:
        part = row(prompt[start : start + size], start, first_block=first_block)
        parts.append(hidden_states(runner, part))
        start += size
    return parts
