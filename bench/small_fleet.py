"""A fleet of real processes on this host, for benchmarks: one thread per worker, a model that is
quick to compute and whose KV is that of a larger one."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import baton
from baton.config import ServeConfig
from baton.fleet import Fleet

VOCAB = 2048
MODEL_NAME = "bench"
# The KV of a model of 0.5B parameters (24 layers, 2 KV heads of 64; float32: 24 KiB per token) and
# 7M parameters, so that a prefill leaves as little time as possible to hide its transfer in.
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": VOCAB,
    "eos_token_id": 2,
}


@asynccontextmanager
async def small_fleet(
    num_prefill: int, num_decode: int, transports: Sequence[str]
) -> AsyncIterator[Fleet]:
    """See `dummy_fleet`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    async with dummy_fleet(
        MODEL,
        served_model_name=MODEL_NAME,
        threads=1,
        prefill_workers=num_prefill,
        decode_workers=num_decode,
        transports=tuple(transports),
        kv_cache_memory_bytes=512 << 20,
        log_level="warning",
    ) as made:
        yield made


@asynccontextmanager
async def dummy_fleet(model: Mapping[str, Any], **settings: Any) -> AsyncIterator[Fleet]:
    """A fleet that is ready to serve random weights; it is stopped and its files are removed at the
    end, and when SIGTERM ends the benchmark.

    Args:
        model: a config.json; the tokenizer is the demo model's.
        settings: of `ServeConfig`.

    Raises:
        TimeoutError: it is not ready after three minutes.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        _write_model(Path(folder), model)
        base = {"load_format": "dummy", "port": 0, "enable_prefix_caching": False}
        made = Fleet(ServeConfig(model=folder, **base, **settings))
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        made.start()
        try:
            async with asyncio.timeout(180):
                while await asyncio.to_thread(made.get, "/health") is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.25)
            yield made
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            await made.stop()
            made.clean()


def _write_model(folder: Path, config: Mapping[str, Any]) -> None:
    for source in (Path(baton.__file__).parent / "demo_model").glob("*token*.json"):
        shutil.copy(source, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
