"""Tiny random pooling checkpoints in Hugging Face's and sentence-transformers' layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from baton.engine.pooling_core import PoolingRow
from baton.engine.pooling_loader import load_pooling_runner
from baton.engine.pooling_runner import PoolingRunner
from baton.engine.runner_config import RunnerConfig
from baton.pooling import PoolingInput
from tests.engine.tiny_models import VOCAB_SIZE

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "pad_token_id": 0,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_CONFIGS: dict[str, Callable[..., Any]] = {
    "bert": lambda **kw: transformers.BertConfig(**{**_SHAPE, **kw}),
    "roberta": lambda **kw: transformers.RobertaConfig(
        **{**_SHAPE, "pad_token_id": 1, "type_vocab_size": 1, **kw}
    ),
    "xlm-roberta": lambda **kw: transformers.XLMRobertaConfig(
        **{**_SHAPE, "pad_token_id": 1, "type_vocab_size": 1, **kw}
    ),
    "llama": lambda **kw: transformers.LlamaConfig(**{**_GROUPED, **kw}),
    "mistral": lambda **kw: transformers.MistralConfig(
        **{**_GROUPED, "sliding_window": 7, "head_dim": 12, **kw}
    ),
    "qwen2": lambda **kw: transformers.Qwen2Config(**{**_GROUPED, **kw}),
    "qwen3": lambda **kw: transformers.Qwen3Config(**{**_GROUPED, "head_dim": 16, **kw}),
}
ENCODERS = ("bert", "roberta", "xlm-roberta")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def save_pooling_model(
    folder: Path,
    family: str,
    kind: Any = transformers.AutoModel,
    *,
    pooling: str | None = None,
    normalizes: bool = False,
    seed: int = 0,
    **overrides: object,
) -> Path:
    """A checkpoint whose every parameter is random, biases and norms too. Returns `folder`.

    Args:
        kind: transformers' auto class, so what stands on the backbone.
        pooling: "cls", "mean" or "last": written down as sentence-transformers does.
    """
    model = kind.from_config(_CONFIGS[family](**overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name.lower() else 0.2 * noise)
    model.save_pretrained(folder)
    if pooling is not None:
        save_modules(folder, pooling, normalizes=normalizes)
    return folder


def save_modules(folder: Path, pooling: str, *, normalizes: bool) -> None:
    """The files of sentence-transformers."""
    names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules += [("Normalize", "2_Normalize")] if normalizes else []
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": 48,
            "include_prompt": True,
            **{f"pooling_mode_{name}": key == pooling for key, name in names.items()},
        },
        "sentence_bert_config.json": {"max_seq_length": 100, "do_lower_case": False},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


def load_runner(folder: Path, **options: Any) -> PoolingRunner:
    return load_pooling_runner(RunnerConfig(str(folder), show_progress=False, **options))


def pool(runner: PoolingRunner, *prompts: list[int], **wanted: Any) -> list[torch.Tensor]:
    """Results of one step."""
    rows = [PoolingRow(PoolingInput(tuple(ids)), **wanted) for ids in prompts]
    return list(map(to_tensor, runner.run(rows)))


def to_tensor(result: bytes | None) -> torch.Tensor:
    assert result is not None, "not finite"
    return torch.frombuffer(bytearray(result), dtype=torch.float32)
