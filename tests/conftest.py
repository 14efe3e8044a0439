"""Fixtures that several rooms use."""

import asyncio
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

# Read when triton is first imported, by whichever test module comes first.
os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: each with one thread
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    os.environ["GRPC_VERBOSITY"] = "ERROR"  # what it writes while no test runs is not captured

import pytest
from redis.asyncio import Redis

from baton.redis_server import redis_command, redis_url


def pytest_runtest_setup() -> None:
    """Who ends the suite from outside, as a time limit does, gets what Ctrl-C gets: fixtures that
    end their processes and remove their folders. Each time, since event loops set it back."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


Until = Callable[..., Awaitable[None]]


class RedisServer:
    """A real Redis on a unix socket; can be killed and started again, empty."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = redis_url(directory)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(redis_command(self.directory), env=dict(os.environ))

    async def ready(self) -> None:
        client = Redis.from_url(self.url)
        async with asyncio.timeout(20):
            while True:
                try:
                    await client.ping()
                    break
                except Exception:  # noqa: BLE001 - whatever it is, it is not up yet
                    await asyncio.sleep(0.02)
        await client.aclose()

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
async def redis_server() -> AsyncIterator[RedisServer]:
    # tmp_path can be longer than a unix socket's name may be.
    with tempfile.TemporaryDirectory(prefix="bt-") as directory:
        server = RedisServer(Path(directory))
        server.start()
        await server.ready()
        yield server
        server.kill()


@pytest.fixture
def until() -> Until:
    """`await until(condition)`: wait for a condition that other tasks or processes bring about."""

    async def wait(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face layout: a random Llama of 2 layers in float32 and a byte-level
    tokenizer whose ids 0…255 are bytes. EOS is the last id."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny-model")
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|user|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    hidden, mlp, kv, vocab_size = 64, 96, 32, len(vocab) + 2
    files = {
        "tokenizer_config": {"eos_token": "<|end|>", "chat_template": template},
        "generation_config": {"eos_token_id": vocab_size - 1, "temperature": 0.8, "top_k": 50},
        "config": {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "dtype": "float32",
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    shapes = {"model.embed_tokens": (vocab_size, hidden), "lm_head": (vocab_size, hidden)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj": (hidden, hidden),
            f"{prefix}.self_attn.k_proj": (kv, hidden),
            f"{prefix}.self_attn.v_proj": (kv, hidden),
            f"{prefix}.self_attn.o_proj": (hidden, hidden),
            f"{prefix}.mlp.gate_proj": (mlp, hidden),
            f"{prefix}.mlp.up_proj": (mlp, hidden),
            f"{prefix}.mlp.down_proj": (hidden, mlp),
            f"{prefix}.input_layernorm": (hidden,),
            f"{prefix}.post_attention_layernorm": (hidden,),
        }
    shapes["model.norm"] = (hidden,)
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.15
        if len(shape) == 2
        else torch.ones(shape)
        for name, shape in shapes.items()
    }
    save_file(weights, str(folder / "model.safetensors"))
    return folder
