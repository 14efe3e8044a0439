"""A fleet of real processes on this host, for benchmarks: one thread per worker, a model that is
quick to compute and whose KV is that of a larger one."""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

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
    """A fleet that is ready to serve; it is stopped and its files are removed at the end.

    Raises:
        TimeoutError: it is not ready after three minutes.
    """
    folder = Path(tempfile.mkdtemp(prefix="baton-bench-"))
    for source in (Path(baton.__file__).parent / "demo_model").glob("*token*.json"):
        shutil.copy(source, folder)
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    made = Fleet(
        ServeConfig(
            model=str(folder),
            load_format="dummy",
            served_model_name=MODEL_NAME,
            port=0,
            threads=1,
            prefill_workers=num_prefill,
            decode_workers=num_decode,
            transports=tuple(transports),
            enable_prefix_caching=False,
            kv_cache_memory_bytes=512 << 20,
            log_level="warning",
        )
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    made.start()
    try:
        async with asyncio.timeout(180):
            while await asyncio.to_thread(made.get, "/health") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.25)
        yield made
    finally:
        await made.stop()
        made.clean()
        shutil.rmtree(folder, ignore_errors=True)
