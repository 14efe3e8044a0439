"""The encoder that BERT, RoBERTa and XLM-RoBERTa share.

    word + position + type ─► norm ─► x
    x ─► q, k, v ─► attention ─► o ─►(+x)─► norm ─► act(up) ─► down ─►(+x)─► norm

The names of its tensors are those of a checkpoint without a head.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.encoder_config import EncoderConfig
from baton.engine.layers.attention import StepAttention
from baton.engine.layers.linear import Linear
from baton.engine.models.decoder import WeightSource, load_linear

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Encoder:
    """Token ids in, hidden states out. Holds weights and nothing that a step changes."""

    def __init__(self, config: EncoderConfig, weights: WeightSource) -> None:
        size, num_positions = config.hidden_size, config.first_position + config.max_len
        table = "embeddings.{}_embeddings.weight".format
        self.words = weights.take(table("word"), config.vocab_size, size)
        self.positions = weights.take(table("position"), num_positions, size)
        self.types = weights.take(table("token_type"), config.num_token_types, size)
        self.first_position = config.first_position
        self.norm = Norm(config, weights, "embeddings.LayerNorm")
        self.layers = [Layer(config, weights, index) for index in range(config.num_layers)]

    def hidden(
        self, token_ids: Tensor, positions: Tensor, types: Tensor, attention: StepAttention
    ) -> Tensor:
        """[num_tokens] ids, positions from 0 and token types, all int64 → [num_tokens,
        hidden_size]."""
        x = F.embedding(token_ids, self.words)
        x = x + F.embedding(positions + self.first_position, self.positions)
        x = self.norm(x + F.embedding(types, self.types))
        for layer in self.layers:
            x = layer(x, attention)
        return x


class Layer:
    def __init__(self, config: EncoderConfig, weights: WeightSource, index: int) -> None:
        prefix, size = f"encoder.layer.{index}", config.hidden_size
        self.index = index
        self.num_heads = config.num_heads
        self.qkv = _load_qkv(config, weights, f"{prefix}.attention.self")
        self.o = load_linear(weights, f"{prefix}.attention.output.dense", size, size, True)
        self.attention_norm = Norm(config, weights, f"{prefix}.attention.output.LayerNorm")
        wide = config.intermediate_size
        self.up = load_linear(weights, f"{prefix}.intermediate.dense", wide, size, True)
        self.act = _ACTIVATIONS[config.activation]
        self.down = load_linear(weights, f"{prefix}.output.dense", size, wide, True)
        self.output_norm = Norm(config, weights, f"{prefix}.output.LayerNorm")

    def __call__(self, x: Tensor, attention: StepAttention) -> Tensor:
        """x: [num_tokens, hidden_size] → like x."""
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)
        x = self.attention_norm(self.o.plus(attention(self.index, q, k, v), x))
        return self.output_norm(self.down.plus(self.act(self.up(x)), x))


class Norm:
    def __init__(self, config: EncoderConfig, weights: WeightSource, name: str) -> None:
        self.weight = weights.take(f"{name}.weight", config.hidden_size)
        self.bias = weights.take(f"{name}.bias", config.hidden_size)
        self.eps = config.layer_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _load_qkv(config: EncoderConfig, weights: WeightSource, prefix: str) -> Linear:
    """Queries, keys and values in one matrix: one GEMM instead of three."""
    size = config.hidden_size
    names = [f"{prefix}.{name}" for name in ("query", "key", "value")]
    weight = torch.cat([weights.take(f"{name}.weight", size, size) for name in names])
    return Linear(weight, torch.cat([weights.take(f"{name}.bias", size) for name in names]))
