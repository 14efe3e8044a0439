"""The two attention backends compute the same; the one for CUDA runs on its references here."""

import torch

from baton.engine.kv_cache import KVCache, kv_layout
from baton.engine.layers.attention import CpuBackend, KernelBackend
from baton.engine.model_config import parse_model_config
from baton.kernels.paged_rows import PagedRow

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "use_sliding_window": True,
    "sliding_window": 20,
    "max_window_layers": 1,
}


def test_backends_agree_on_a_mixed_step() -> None:
    config = parse_model_config(CONFIG)
    assert config.windows == (0, 20, 20)
    caches = [
        KVCache(kv_layout(config, 16, torch.float32), 32, torch.device("cpu")) for _ in range(2)
    ]
    cpu, kernels = CpuBackend(config, caches[0], None), KernelBackend(config, caches[1])
    torch.manual_seed(0)
    steps = [
        [PagedRow(0, 1, [9]), PagedRow(0, 40, [4, 5, 6]), PagedRow(0, 17, [20, 2])],
        [PagedRow(1, 1, [9]), PagedRow(40, 1, [4, 5, 6]), PagedRow(17, 30, [20, 2, 7])],
        [PagedRow(2, 1, [9]), PagedRow(41, 1, [4, 5, 6]), PagedRow(47, 1, [20, 2, 7])],
        [PagedRow(42, 6, [4, 5, 6])],
    ]
    for rows in steps:
        num_tokens = sum(row.num_queries for row in rows)
        plans = [backend.plan(rows) for backend in (cpu, kernels)]
        for layer in range(config.num_layers):
            heads = torch.randn(num_tokens, 8, config.head_dim)
            q, k, v = heads.split((4, 2, 2), dim=1)
            one, other = (plan(layer, q, k, v) for plan in plans)
            assert one.shape == (num_tokens, 4 * config.head_dim)
            assert (one - other).abs().max() < 1e-5
    assert torch.equal(caches[0].tensor, caches[1].tensor)
