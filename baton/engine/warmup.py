"""The largest step, run once before anybody waits for it: it compiles kernels, and shows how much
memory a step takes beside weights and KV."""

from collections.abc import Iterator

import torch

from baton.engine.batch import Batch, SampleRequest, ScheduledRow
from baton.engine.runner import ModelRunner
from baton.types import BlockId, SamplingParams

# Sorting the vocabulary takes the most memory of all ways to sample; a top-k that large needs it.
_PARAMS = (SamplingParams(temperature=1.0, top_k=30_000), SamplingParams(temperature=1.0))


def num_warmup_blocks(max_num_batched_tokens: int, max_num_seqs: int, block_size: int) -> int:
    """Blocks that `largest_batch` needs."""
    return -(-max_num_batched_tokens // block_size) + max_num_seqs + 1


def largest_batch(
    max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int
) -> Batch:
    """`max_num_batched_tokens` tokens in at most `max_num_seqs` rows that all sample: decodes, and
    prefills as long as they can be."""
    rows: list[ScheduledRow] = []
    first_block = 0
    for length in _row_lens(max_num_batched_tokens, max_num_seqs, max_model_len):
        num_blocks = -(-length // block_size)
        block_ids = [BlockId(first_block + i) for i in range(num_blocks)]
        first_block += num_blocks
        params = _PARAMS[len(rows) == 1]
        sample = SampleRequest(0, 0, length, params, (0,), ())
        rows.append(ScheduledRow(len(rows), [0] * length, 0, block_ids, (sample,)))
    return Batch(tuple(rows))


def _row_lens(num_tokens: int, max_rows: int, max_len: int) -> Iterator[int]:
    for left in range(max_rows, 0, -1):
        length = min(num_tokens - (left - 1), max_len) if num_tokens >= left else 1
        if num_tokens < 1:
            return
        yield length
        num_tokens -= length


def measure_workspace(runner: ModelRunner, batch: Batch) -> int:
    """Bytes of device memory that a step of `batch` takes beside weights and pool. CUDA only."""
    device = runner.kv_cache.tensor.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.run(batch)
    return torch.cuda.max_memory_allocated(device) - before
