"""From a sequence's hidden states to its result: pooling, head, activation. All in float32."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.encoder_config import EncoderConfig
from baton.engine.models.decoder import WeightSource
from baton.engine.pooling_config import PoolingConfig, PoolingMethod
from baton.pooling import PoolingTask

Head = Callable[[Tensor], Tensor]


class Pooler:
    def __init__(self, config: PoolingConfig, weights: WeightSource) -> None:
        self._config = config
        is_score = config.info.task is PoolingTask.SCORE
        self._head = _load_head(config, weights) if is_score else None

    def __call__(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """
        Args:
            hidden: [num_tokens, hidden_size] of sequences one behind the other.

        Returns: [num_sequences, num_values] float32, without activation.
        """
        pooled = _pool(hidden, lengths, self._config.method)
        return pooled if self._head is None else self._head(pooled)

    def activate(
        self, values: Tensor, use_activation: bool | None = None, dimensions: int | None = None
    ) -> Tensor:
        """
        Args:
            values: [num_values] of one sequence.
            use_activation, dimensions: see `baton.pooling.PoolingRequest`.
        """
        values = values[:dimensions]
        if not (self._config.use_activation if use_activation is None else use_activation):
            return values
        return values.sigmoid() if self._head is not None else F.normalize(values, dim=-1)


def _pool(hidden: Tensor, lengths: Sequence[int], method: PoolingMethod) -> Tensor:
    if method is PoolingMethod.MEAN:
        return torch.stack([part.mean(0) for part in torch.split(hidden.float(), list(lengths))])
    ends = list(accumulate(lengths))
    first = [end - length for end, length in zip(ends, lengths, strict=True)]
    rows = first if method is PoolingMethod.CLS else [end - 1 for end in ends]
    return hidden[torch.tensor(rows, device=hidden.device)].float()


def _load_head(config: PoolingConfig, weights: WeightSource) -> Head:
    """A classifier's; BERT's has its pooler in front of it, RoBERTa's a layer of its own."""
    backbone, num_values = config.backbone, config.info.num_values
    size = backbone.hidden_size
    if not isinstance(backbone, EncoderConfig):
        score = weights.take("score.weight", num_values, size).float()
        return lambda x: F.linear(x, score)
    is_bert = backbone.prefix == "bert."
    dense, out = (
        ("pooler.dense", "classifier") if is_bert else ("classifier.dense", "classifier.out_proj")
    )
    inner = weights.take(f"{dense}.weight", size, size).float()
    inner_bias = weights.take(f"{dense}.bias", size).float()
    outer = weights.take(f"{out}.weight", num_values, size).float()
    outer_bias = weights.take(f"{out}.bias", num_values).float()
    return lambda x: F.linear(F.linear(x, inner, inner_bias).tanh(), outer, outer_bias)
