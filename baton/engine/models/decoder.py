"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share. What sets them apart is in
`ModelConfig`: biases, normalised queries and keys, windows, RoPE scaling.

    x ─► norm ─► q, k, v ─► rope ─► attention ─► o ─►(+x)─► norm ─► silu(gate) * up ─► down ─►(+x)

Weights come from a `WeightSource` one tensor at a time and are handed on at once, so that no second
copy of the model exists while it loads.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.layers.attention import StepAttention
from baton.engine.layers.linear import GatedLinear, Linear
from baton.engine.layers.rotary import Rotary
from baton.engine.model_config import ModelConfig
from baton.kernels.rms_norm import rms_norm
from baton.kernels.rope import rope


class WeightSource(Protocol):
    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name, in the model's dtype and on its device.

        Raises:
            InvalidRequest: it is missing or has another shape.
        """
        ...


class Decoder:
    """Token ids in, logits out. Holds weights and nothing that a step changes."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        max_len: int,
        device: torch.device,
        *,
        has_head: bool = True,
    ) -> None:
        """
        Args:
            has_head: False: no logits, and nothing is read for them.
        """
        vocabulary = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = weights.take("model.embed_tokens.weight", *vocabulary)
        self.rotary = Rotary(config.rope, config.head_dim, max_len, device)
        self.layers = [Layer(config, weights, index) for index in range(config.num_layers)]
        self.norm = Norm(config, weights, "model.norm", config.hidden_size)
        self.head = _load_head(config, weights, self.embedding) if has_head else None

    def hidden(self, token_ids: Tensor, positions: Tensor, attention: StepAttention) -> Tensor:
        """[num_tokens] ids and positions, both int64 → [num_tokens, hidden_size], normalised."""
        x = F.embedding(token_ids, self.embedding)
        cos_sin = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, cos_sin, attention)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden_size] → [num_rows, vocab_size]."""
        assert self.head is not None, "made with a head"
        return self.head(hidden)

    def linears(self) -> list[Linear]:
        """Every linear layer."""
        of_layers = [
            linear
            for layer in self.layers
            for linear in (layer.qkv, layer.o, *layer.gated.linears, layer.down)
        ]
        return of_layers if self.head is None else [*of_layers, self.head]


class Layer:
    def __init__(self, config: ModelConfig, weights: WeightSource, index: int) -> None:
        prefix = f"model.layers.{index}"
        self.index = index
        self.head_dim = config.head_dim
        self.num_heads = config.num_heads
        self.num_qk_heads = config.num_heads + config.num_kv_heads
        self.input_norm = Norm(config, weights, f"{prefix}.input_layernorm", config.hidden_size)
        self.qkv = _load_qkv(config, weights, f"{prefix}.self_attn")
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = Norm(config, weights, f"{prefix}.self_attn.q_norm", config.head_dim)
            self.k_norm = Norm(config, weights, f"{prefix}.self_attn.k_norm", config.head_dim)
        q_size = config.num_heads * config.head_dim
        o = f"{prefix}.self_attn.o_proj"
        self.o = load_linear(weights, o, config.hidden_size, q_size, config.o_bias)
        post = f"{prefix}.post_attention_layernorm"
        self.post_norm = Norm(config, weights, post, config.hidden_size)
        wide, narrow, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        gate = load_linear(weights, f"{prefix}.mlp.gate_proj", wide, narrow, bias)
        up = load_linear(weights, f"{prefix}.mlp.up_proj", wide, narrow, bias)
        self.gated = GatedLinear(gate, up, is_merged=not gate.packed and gate.weight.is_cuda)
        self.down = load_linear(weights, f"{prefix}.mlp.down_proj", narrow, wide, bias)

    def __call__(self, x: Tensor, cos_sin: Tensor, attention: StepAttention) -> Tensor:
        """x: [num_tokens, hidden_size], cos_sin as in `kernels.rope` → like x."""
        heads = self.qkv(self.input_norm(x)).view(len(x), -1, self.head_dim)
        qk, v = heads[:, : self.num_qk_heads], heads[:, self.num_qk_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        qk = rope(qk, cos_sin)
        seen = attention(self.index, qk[:, : self.num_heads], qk[:, self.num_heads :], v)
        x = self.o.plus(seen, x)
        return self.down.plus(self.gated(self.post_norm(x)), x)


class Norm:
    def __init__(self, config: ModelConfig, weights: WeightSource, name: str, size: int) -> None:
        self.weight = weights.take(f"{name}.weight", size)
        self.eps = config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def _load_head(config: ModelConfig, weights: WeightSource, embedding: Tensor) -> Linear:
    """Packing makes a second copy of a tied embedding: the table is read by row, the head whole."""
    if config.tie_embeddings:
        return Linear(embedding)
    return Linear(weights.take("lm_head.weight", config.vocab_size, config.hidden_size))


def load_linear(
    weights: WeightSource, name: str, out_features: int, in_features: int, bias: bool
) -> Linear:
    weight = weights.take(f"{name}.weight", out_features, in_features)
    return Linear(weight, weights.take(f"{name}.bias", out_features) if bias else None)


def _load_qkv(config: ModelConfig, weights: WeightSource, prefix: str) -> Linear:
    """Queries, keys and values in one matrix: one GEMM instead of three."""
    sizes = {
        "q_proj": config.num_heads * config.head_dim,
        "k_proj": config.num_kv_heads * config.head_dim,
        "v_proj": config.num_kv_heads * config.head_dim,
    }
    weight = torch.cat(
        [
            weights.take(f"{prefix}.{n}.weight", size, config.hidden_size)
            for n, size in sizes.items()
        ]
    )
    if not config.qkv_bias:
        return Linear(weight)
    bias = torch.cat([weights.take(f"{prefix}.{n}.bias", size) for n, size in sizes.items()])
    return Linear(weight, bias)
