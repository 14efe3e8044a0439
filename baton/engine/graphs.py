"""Decode steps as CUDA graphs: the launches of a whole step, captured once and replayed.

A decode step of a few rows is some ten short kernels per layer, and the processor needs longer to
launch them than the device to run them. A graph is captured per batch size (as vLLM does); a step
takes the smallest that holds its rows and leaves the others empty: no context, and a slot that says
"stored nowhere".

What a graph reads stays at fixed addresses. Block ids are uploaded for the rows whose blocks have
changed since the previous step, one in sixteen as a rule.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from baton.engine.batch import ScheduledRow
from baton.engine.layers.attention import KernelBackend, StepTables, block_table
from baton.engine.models.decoder import Decoder
from baton.kernels.paged_rows import PagedRow

log = logging.getLogger(__name__)

_MAX_SIZE = 512
_NOWHERE = -1

# Runs a function that launches work, and returns how to repeat it, and its result, which every
# repetition overwrites.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph, ascending: every step of up to `max_num_seqs` (or 512) rows wastes
    less than half of one, or less than eight rows."""
    largest = min(max_num_seqs, _MAX_SIZE)
    return sorted({size for size in (1, 2, 4) if size < largest} | {*range(8, largest, 8), largest})


def cuda_capture(device: torch.device) -> Capture:
    """Captures graphs that share one pool of memory: only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        function()  # compiles kernels and has libraries allocate what they need
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = function()
        return graph.replay, output

    return capture


class DecodeGraphs:
    """Runs steps whose rows have one token each. Touched by the runner's thread only."""

    def __init__(
        self,
        model: Decoder,
        backend: KernelBackend,
        block_size: int,
        max_model_len: int,
        sizes: Sequence[int],
        device: torch.device,
        capture: Capture,
    ) -> None:
        """
        Args:
            sizes: batch sizes, ascending.
            max_model_len: tokens of the longest context.
        """
        self._model, self._backend, self._block_size = model, backend, block_size
        rows, width = sizes[-1], -(-max_model_len // block_size)
        on_cuda = device.type == "cuda"
        # [token ids, positions, slots], on the device and where it copies them from
        self._inputs = torch.zeros((3, rows), dtype=torch.int64, device=device)
        self._staged = torch.zeros((3, rows), dtype=torch.int64, pin_memory=on_cuda)
        self._table = torch.zeros((rows, width), dtype=torch.int32, device=device)
        self._held: list[Sequence[int]] = [()] * rows  # what `_table` holds
        self._stage(())
        self._graphs: dict[int, tuple[Callable[[], object], Tensor]] = {}
        for size in reversed(sizes):  # the smaller ones fit into the memory of the largest
            self._graphs[size] = capture(partial(self._forward, size))
        self._sizes = list(sizes)
        log.info("captured decode steps of up to %d sequences", rows)

    def run(self, rows: Sequence[ScheduledRow]) -> Tensor | None:
        """[num_rows, hidden_size], overwritten by the next run; None if no graph is that large.

        Args:
            rows: of one token each.
        """
        size = next((size for size in self._sizes if size >= len(rows)), None)
        if size is None:
            return None
        self._upload_blocks(rows)
        self._stage(rows)
        replay, hidden = self._graphs[size]
        replay()
        return hidden[: len(rows)]

    def _forward(self, size: int) -> Tensor:
        token_ids, positions, slots = self._inputs[:, :size]
        lens = (positions + 1).int()
        tables = StepTables(slots, self._table[:size], lens, num_decodes=size)
        return self._model.hidden(token_ids, positions, self._backend.attention(tables))

    def _stage(self, rows: Sequence[ScheduledRow]) -> None:
        """The caller waits for each step before the next, so the previous copy is done."""
        columns = self._staged.numpy()
        columns[0], columns[1:] = 0, _NOWHERE
        for column, row in zip(columns.T, rows, strict=False):
            block, offset = divmod(row.start, self._block_size)
            slot = row.block_ids[block] * self._block_size + offset
            column[:] = row.token_ids[0], row.start, slot
        self._inputs.copy_(self._staged, non_blocking=True)

    def _upload_blocks(self, rows: Sequence[ScheduledRow]) -> None:
        changed = []
        for index, row in enumerate(rows):
            used = row.block_ids[: row.start // self._block_size + 1]
            if used != self._held[index]:
                self._held[index] = used
                changed.append(index)
        if not changed:
            return
        paged = [PagedRow(rows[index].start, 1, self._held[index]) for index in changed]
        values = torch.from_numpy(block_table(paged, self._block_size)).to(self._table.device)
        lines = torch.tensor(changed, device=self._table.device)
        self._table[:, : values.shape[1]].index_copy_(0, lines, values)
