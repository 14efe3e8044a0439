"""The numerical half of an engine: a batch of rows in, sampled tokens out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.batch import NOT_FINITE, Batch, OnLayers, Sampled, ScheduledRow, Scoring
from baton.engine.graphs import DecodeGraphs
from baton.engine.kv_cache import KVCache
from baton.engine.layer_events import LayerEvents
from baton.engine.layers.attention import AttentionBackend, StepAttention
from baton.engine.models.decoder import Decoder
from baton.engine.sampler import Sampler
from baton.grammar import Grammars
from baton.kernels.logprobs import Wanted, token_logprobs
from baton.kernels.paged_rows import PagedRow, query_slots

log = logging.getLogger(__name__)

SCORED_AT_ONCE = 64  # prompt tokens whose logits are held together


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rest of an engine and a registration need to know about the model."""

    name: str
    fingerprint: bytes  # 32 bytes
    max_model_len: int
    vocab_size: int
    num_layers: int
    eos_token_ids: tuple[int, ...]
    batch_invariant: bool
    device: str


class ModelRunner:
    """Implements `baton.engine.batch.Runner`. Made by `baton.engine.loader.load_runner`.

    Touched by one thread only. `kv_cache` is the pool that transports read and write.
    """

    def __init__(
        self,
        info: ModelInfo,
        model: Decoder,
        kv_cache: KVCache,
        attention: AttentionBackend,
        sampler: Sampler,
        grammars: Grammars,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.info = info
        self.grammars = grammars  # what `sampler` compiles with; callable from any thread
        self.kv_cache = kv_cache
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._graphs = graphs
        is_cuda = kv_cache.tensor.is_cuda
        self._layer_events = LayerEvents(info.num_layers) if is_cuda else None

    @torch.inference_mode()
    def run(
        self, batch: Batch, on_layers: OnLayers | None = None
    ) -> dict[int, tuple[Sampled, ...]]:
        """See `baton.engine.batch.Runner`."""
        try:
            return self._run(batch, on_layers)
        finally:
            if self._layer_events is not None:
                self._layer_events.finish()

    def _run(self, batch: Batch, on_layers: OnLayers | None) -> dict[int, tuple[Sampled, ...]]:
        self.kv_cache.copy_blocks(batch.copies)
        if not batch.rows:
            self._wait()
            return {}
        # The CUDA kernels take rows with one token first; sampling does not mind the order.
        rows = sorted(batch.rows, key=lambda row: len(row.token_ids) > 1)
        hidden = self._decode(rows)
        if hidden is None:
            hidden = self._forward(rows, on_layers)
        is_finite = hidden.sum(dim=1, dtype=torch.float32).isfinite()
        results = self._sample(rows, hidden)
        end = 0
        for row in rows:
            start, end = end, end + len(row.token_ids)
            if row.scoring is not None:
                scored = self._score(hidden[start:end], row.scoring)
                results[row.row_id] = scored + results.get(row.row_id, ())
        # Asked last, so that a device has worked through everything when it is waited for.
        if not is_finite.all():
            results |= self._refuse_broken(rows, is_finite)
            self._wait()
        return results

    def _score(self, hidden: Tensor, scoring: Scoring) -> tuple[Sampled, ...]:
        """In pieces: logits of a whole chunk may be larger than the model."""
        scored: list[Sampled] = []
        for start in range(0, len(scoring.token_ids), SCORED_AT_ONCE):
            targets = scoring.token_ids[start : start + SCORED_AT_ONCE]
            logits = self._model.logits(hidden[start : start + len(targets)]).float().contiguous()
            wanted = [Wanted(i, token_id, scoring.num_top) for i, token_id in enumerate(targets)]
            logprobs = token_logprobs(logits, wanted)
            scored += map(Sampled, targets, logprobs)
        return tuple(scored)

    def hidden_states(self, batch: Batch) -> Tensor:
        """[num_tokens, hidden_size] of all tokens of all rows, in the batch's order; no sampling.

        For tests and benchmarks; `run` is what an engine calls.
        """
        with torch.inference_mode():
            self.kv_cache.copy_blocks(batch.copies)
            return self._forward(batch.rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden_size] → [num_rows, vocab_size]."""
        with torch.inference_mode():
            return self._model.logits(hidden)

    def close(self) -> None:
        """Idempotent."""
        if self._layer_events is not None:
            self._layer_events.close()

    def _wait(self) -> None:
        """Until the device has done what was launched: blocks may change hands after a step."""
        if self.kv_cache.tensor.is_cuda:
            torch.cuda.current_stream(self.kv_cache.tensor.device).synchronize()

    def _sample(
        self, rows: Sequence[ScheduledRow], hidden: Tensor
    ) -> dict[int, tuple[Sampled, ...]]:
        sampling = [i for i, row in enumerate(rows) if row.samples]
        if not sampling:
            return {}
        logits = self._model.logits(hidden[_last_tokens(rows, sampling, hidden.device)])
        sampled = self._sampler.sample(logits, [rows[index].samples for index in sampling])
        row_ids = [rows[index].row_id for index in sampling]
        return dict(zip(row_ids, sampled, strict=True))

    def _refuse_broken(
        self, rows: Sequence[ScheduledRow], is_finite: Tensor
    ) -> dict[int, tuple[Sampled, ...]]:
        """Answers for rows with a token whose hidden state is not finite; clears their new KV.

        No infinity stays in the pool: attention may read stale slots, masked, and a masked infinity
        is still a NaN.

        Args:
            is_finite: [num_tokens] bool.
        """
        results, end = {}, 0
        for row in rows:
            start, end = end, end + len(row.token_ids)
            if not is_finite[start:end].all():
                slots = list(query_slots([_paged(row)], self.kv_cache.block_size))
                self.kv_cache.tensor.flatten(2, 3)[:, :, slots] = 0
                results[row.row_id] = (Sampled(NOT_FINITE),) * max(1, row.num_answers)
        return results

    def _decode(self, rows: Sequence[ScheduledRow]) -> Tensor | None:
        """The hidden states of a step that a graph can do."""
        if self._graphs is None or any(len(row.token_ids) > 1 for row in rows):
            return None
        return self._graphs.run(rows)

    def _forward(self, rows: Sequence[ScheduledRow], on_layers: OnLayers | None = None) -> Tensor:
        device = self.kv_cache.tensor.device
        token_ids = [token_id for row in rows for token_id in row.token_ids]
        positions = [p for row in rows for p in range(row.start, row.num_context_tokens)]
        inputs = torch.tensor((token_ids, positions)).to(device, non_blocking=True)
        plan = self._attention.plan([_paged(row) for row in rows])
        if on_layers is not None:
            announce = announcing if self._layer_events is None else self._layer_events.announcing
            plan = announce(plan, on_layers)
        return self._model.hidden(inputs[0], inputs[1], plan)


def announcing(attention: StepAttention, on_layers: OnLayers) -> StepAttention:
    """The same attention, telling of each layer once its keys and values are stored.

    Only where that has happened by the time a layer's call returns: on a device that works through
    a stream, whoever tells must have waited for an event behind the store. KV that is not finite is
    not told of, so that it stays where `_refuse_broken` clears it.
    """
    is_finite = True

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal is_finite
        seen = attention(layer, q, k, v)
        total = k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)
        is_finite = is_finite and bool(total.isfinite())
        if is_finite:
            on_layers(layer + 1)
        return seen

    return attend


def _paged(row: ScheduledRow) -> PagedRow:
    return PagedRow(row.start, len(row.token_ids), row.block_ids)


def _last_tokens(
    rows: Sequence[ScheduledRow], sampling: Sequence[int], device: torch.device
) -> Tensor:
    """[len(sampling)] int64: where each sampling row's last token is among all tokens."""
    ends, end = [], 0
    for row in rows:
        end += len(row.token_ids)
        ends.append(end - 1)
    return torch.tensor([ends[index] for index in sampling], device=device)
