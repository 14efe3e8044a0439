"""The numerical half of a pooling engine: token ids in, results out, nothing kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.layers.packed_attention import PackedAttention
from baton.engine.models.decoder import Decoder
from baton.engine.models.encoder import Encoder
from baton.engine.pooler import Pooler
from baton.engine.pooling_core import PoolingRow
from baton.pooling import PoolingInfo, PoolingInput


@dataclass(frozen=True, slots=True)
class PoolingModelInfo:
    """What the rest of an engine and a registration need to know about the model."""

    name: str
    fingerprint: bytes  # 32 bytes
    max_model_len: int
    vocab_size: int
    pooling: PoolingInfo
    device: str


class PoolingRunner:
    """Made by `baton.engine.pooling_loader.load_pooling_runner`. Touched by one thread only."""

    def __init__(
        self,
        info: PoolingModelInfo,
        model: Decoder | Encoder,
        attention: PackedAttention,
        pooler: Pooler,
        device: torch.device,
    ) -> None:
        self.info = info
        self._model = model
        self._attention = attention
        self._pooler = pooler
        self._device = device

    @torch.inference_mode()
    def run(self, rows: Sequence[PoolingRow]) -> list[bytes | None]:
        """Of each row its result, float32 little-endian; None where that is not finite."""
        # Rows of one length lie side by side: see PackedAttention.
        order = sorted(range(len(rows)), key=lambda index: rows[index].num_tokens)
        lengths = [rows[index].num_tokens for index in order]
        hidden = self._hidden([rows[index].input for index in order], lengths)
        pooled = self._pooler(hidden, lengths).cpu()
        is_finite = pooled.isfinite().all(dim=1).tolist()
        results: list[bytes | None] = [None] * len(rows)
        for values, index, is_good in zip(pooled, order, is_finite, strict=True):
            if is_good:
                row = rows[index]
                result = self._pooler.activate(values, row.use_activation, row.dimensions)
                results[index] = result.contiguous().numpy().astype("<f4").tobytes()
        return results

    def _hidden(self, inputs: Sequence[PoolingInput], lengths: Sequence[int]) -> Tensor:
        token_ids = [token_id for one in inputs for token_id in one.token_ids]
        positions = [position for length in lengths for position in range(length)]
        plan = self._attention.plan(lengths, self._device)
        if isinstance(self._model, Decoder):
            tensors = torch.tensor((token_ids, positions)).to(self._device)
            return self._model.hidden(tensors[0], tensors[1], plan)
        types = [kind for one in inputs for kind in _token_types(one)]
        tensors = torch.tensor((token_ids, positions, types)).to(self._device)
        return self._model.hidden(tensors[0], tensors[1], tensors[2], plan)


def _token_types(one: PoolingInput) -> list[int]:
    num_tokens = len(one.token_ids)
    num_first = num_tokens if one.second_start is None else one.second_start
    return [0] * num_first + [1] * (num_tokens - num_first)
