"""Tiny random checkpoints of every supported family, and ways to run them.

`save_tiny_model(folder, "qwen3")` writes a Hugging Face folder that both transformers and our
loader read; no tokenizer, token ids in and out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from baton.engine.commands import AddLocal
from baton.engine.config import EngineConfig
from baton.engine.core import EngineCore
from baton.engine.events import LegFailed, LegTokens
from baton.engine.loader import load_runner
from baton.engine.runner import ModelRunner
from baton.engine.runner_config import RunnerConfig
from baton.text import Tokenizer
from baton.types import LegId, Request, SamplingParams

VOCAB_SIZE = 320
MAX_LEN = 512
WINDOW = 24
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig,
    "llama3-rope": lambda **kw: transformers.LlamaConfig(rope_parameters=_LLAMA3, **kw),
    "llama-biases": lambda **kw: transformers.LlamaConfig(attention_bias=True, mlp_bias=True, **kw),
    "mistral": lambda **kw: transformers.MistralConfig(sliding_window=None, head_dim=16, **kw),
    "mistral-window": lambda **kw: transformers.MistralConfig(
        **{"sliding_window": WINDOW, "head_dim": 16, **kw}
    ),
    "qwen2": transformers.Qwen2Config,
    "qwen2-some-windows": lambda **kw: transformers.Qwen2Config(
        use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, **kw
    ),
    "qwen3": lambda **kw: transformers.Qwen3Config(head_dim=32, **kw),
}
FAMILIES = tuple(_FAMILIES)


def save_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    shard_size: str = "1GB",
    seed: int = 0,
    **overrides: object,
) -> Path:
    """A checkpoint whose every parameter is random, biases and norms too. Returns `folder`."""
    config = _FAMILIES[family](**{**_SHAPE, "tie_word_embeddings": tied, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same checkpoint in transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load_tiny_runner(
    folder: Path, load_tokenizer: Callable[[], Tokenizer] | None = None, **options: Any
) -> ModelRunner:
    """A runner with a pool of 128 blocks unless told otherwise."""
    options.setdefault("kv_cache_memory_bytes", 128 * _block_bytes(options))
    return load_runner(RunnerConfig(str(folder), show_progress=False, **options), load_tokenizer)


def _block_bytes(options: dict[str, Any]) -> int:
    # As wide as the widest family here; narrower ones get more blocks.
    return int(options.get("block_size", 16)) * 3 * 2 * 2 * 32 * 4


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths
    ]


def make_core(runner: ModelRunner, **options: Any) -> EngineCore:
    """An engine over this runner. `options`: of EngineConfig."""
    defaults = {"max_num_batched_tokens": 2048, "max_num_seqs": 64}
    options = {"num_blocks": runner.kv_cache.num_blocks, **defaults, **options}
    config = EngineConfig(
        block_size=runner.kv_cache.block_size,
        max_model_len=runner.info.max_model_len,
        vocab_size=runner.info.vocab_size,
        num_layers=runner.info.num_layers,
        fingerprint=runner.info.fingerprint,
        **options,
    )
    return EngineCore(config, runner)


def generate(
    core: EngineCore, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[list[int]]:
    """All prompts at once through the engine; the first choice's tokens of each."""
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        request = Request(str(index), tuple(prompt), params)
        core.apply(AddLocal(LegId(str(index), 0), request))
    while core.has_work:
        step = core.step()
        for event in step.events if step else ():
            assert not isinstance(event, LegFailed), event
            if isinstance(event, LegTokens) and event.chunk.choice == 0:
                outputs[event.chunk.leg.request_id] += event.chunk.token_ids
    core.check_integrity()
    return list(outputs.values())
