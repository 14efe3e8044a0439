"""Checkpoints: how they are found, read and identified, and what is wrong with broken ones."""

import hashlib
import json
import logging
import weakref
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.engine import checkpoint
from baton.engine.device import num_kv_blocks, select_device
from baton.engine.loader import load_runner
from baton.engine.model_config import load_model_config
from baton.engine.models.decoder import Decoder
from baton.engine.runner_config import RunnerConfig
from baton.engine.weights import SafetensorsWeights
from baton.errors import InvalidRequest
from tests.engine.rows import hidden_states, row
from tests.engine.tiny_models import load_tiny_runner, random_prompts, save_tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of the only shard, or drop them (None); dots in names as `__`."""
    weights = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, folder / WEIGHTS)


def test_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(InvalidRequest, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_tiny_runner(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(65))
    with pytest.raises(InvalidRequest, match=r"model\.norm\.weight .* \[65\], not \[64\]"):
        load_tiny_runner(folder)


def test_a_tensor_that_is_no_float(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(InvalidRequest, match=r"torch\.int8, not a float"):
        load_tiny_runner(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(InvalidRequest, match=r"model\.safetensors is damaged or incomplete"):
        load_tiny_runner(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "sharded", shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InvalidRequest, match=f"lacks the shards {shard.name}"):
        load_tiny_runner(folder)


def test_an_index_that_is_no_index(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "sharded", shard_size="100KB")
    (folder / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InvalidRequest, match=r"index\.json is not usable"):
        load_tiny_runner(folder)


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidRequest, match="no safetensors"):
        load_tiny_runner(folder)


def test_a_model_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("cannot be reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InvalidRequest, match=r"some/model is neither .* cannot be reached"):
        load_runner(RunnerConfig("some/model"))


def test_the_config_is_checked_before_the_weights_are_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[list[str]] = []

    def download(model: str, *, revision: str, allow_patterns: list[str], **_: object) -> str:
        assert (model, revision) == ("some/model", "v2")
        wanted.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_runner(
        RunnerConfig("some/model", "v2", kv_cache_memory_bytes=1 << 22, show_progress=False)
    )
    assert "*.safetensors" not in wanted[0]
    assert "*.safetensors" in wanted[1]


def test_no_second_copy_of_the_model_exists_while_it_loads(folder: Path) -> None:
    class Counting(SafetensorsWeights):
        alive: ClassVar[list["weakref.ref[Tensor]"]] = []
        most_bytes = 0

        def take(self, name: str, *shape: int) -> Tensor:
            tensor = super().take(name, *shape)
            if tensor.dim() == 2 and "embed" not in name:
                self.alive.append(weakref.ref(tensor))
            here = [found for found in (ref() for ref in self.alive) if found is not None]
            self.most_bytes = max(self.most_bytes, sum(t.nbytes for t in here))
            return tensor

    config, device = load_model_config(folder), torch.device("cpu")
    with Counting([folder / WEIGHTS], torch.float32, device, show_progress=False) as weights:
        model = Decoder(config, weights, 128, device)
    assert all(linear.packed for linear in model.linears()), "else the dense ones are the model"
    largest = 4 * max(config.vocab_size, config.intermediate_size) * config.hidden_size
    assert 0 < weights.most_bytes <= largest


def test_progress_and_total_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="baton")
    load_runner(RunnerConfig(str(folder), kv_cache_memory_bytes=1 << 22))
    assert "Loading weights: 100%" in capsys.readouterr().err
    assert "loaded in" in caplog.text
    assert "GiB" in caplog.text
    load_runner(RunnerConfig(str(folder), kv_cache_memory_bytes=1 << 22, show_progress=False))
    assert "Loading weights" not in capsys.readouterr().err


def test_dummy_weights_need_no_files(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (prompt,) = random_prompts(20)

    def states(seed: int) -> Tensor:
        runner = load_tiny_runner(folder, load_format="dummy", seed=seed)
        return hidden_states(runner, row(prompt))

    assert states(0).isfinite().all()
    assert torch.equal(states(0), states(0))
    assert not torch.equal(states(0), states(1))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_model_len": 4096}, "max_model_len"),
        ({"max_model_len": 256, "kv_cache_memory_bytes": 1 << 16}, "kv_cache_memory_bytes"),
        ({"kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes"),
        ({"device": "cuda:7"}, "device"),
        ({"device": "mps"}, "device"),
    ],
)
def test_settings_that_cannot_be_had(folder: Path, options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_runner(RunnerConfig(str(folder), show_progress=False, **options))
    assert caught.value.param == param


def test_a_small_pool_limits_the_length_unless_it_was_asked_for(folder: Path) -> None:
    runner = load_tiny_runner(folder, kv_cache_memory_bytes=1 << 17)
    num_tokens = runner.kv_cache.num_blocks * runner.kv_cache.block_size
    assert runner.info.max_model_len == num_tokens < 512


def test_the_pool_is_as_large_as_its_sequences_need(folder: Path) -> None:
    runner = load_runner(
        RunnerConfig(str(folder), show_progress=False, max_num_seqs=3, block_size=32)
    )
    assert runner.kv_cache.num_blocks == 3 * 512 // 32


def test_the_pool_on_cuda_is_what_utilization_and_workspace_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """80 GB: 20 are this process's, and 10 or 60 another's."""
    gb, cuda = 10**9, torch.device("cuda", 0)
    free = {"bytes": 50 * gb}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80 * gb))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * gb)
    config = RunnerConfig("some/model", gpu_memory_utilization=0.75)
    assert num_kv_blocks(config, gb, 512, cuda) == 39  # 60 - 20 - what CUDA itself takes
    assert num_kv_blocks(config, gb, 512, cuda, workspace_bytes=4 * gb) == 35
    told = RunnerConfig("some/model", kv_cache_memory_bytes=7 * gb)
    assert num_kv_blocks(told, gb, 512, cuda, workspace_bytes=4 * gb) == 7
    free["bytes"] = 5 * gb
    assert num_kv_blocks(config, gb, 512, cuda, workspace_bytes=3 * gb) == 2
    with pytest.raises(InvalidRequest, match="no room"):
        num_kv_blocks(config, gb, 512, cuda, workspace_bytes=5 * gb)


def test_cuda_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CC", "true")
    assert select_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(InvalidRequest, match="C compiler"):
        select_device("cuda")


# ── fingerprint ──────────────────────────────────────────────────────────────────────────────────


def fingerprint(folder: Path, **options: Any) -> bytes:
    return load_tiny_runner(folder, **options).info.fingerprint


def test_what_changes_the_kv_changes_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    original = fingerprint(folder)
    assert len(original) == 32
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fingerprint(copy) == original
    assert fingerprint(folder, block_size=32, max_model_len=128) == original
    assert fingerprint(folder, dtype="bfloat16") != original
    assert fingerprint(folder, load_format="dummy") != original
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = 20000.0
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert fingerprint(copy) != original


def test_one_flipped_bit_changes_the_fingerprint(folder: Path) -> None:
    original = fingerprint(folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert fingerprint(folder) != original


def test_digests_are_cached_until_the_file_changes(
    folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = hashlib.file_digest

    def count(stream: Any, name: str) -> Any:
        read.append(stream.name)
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", count)
    first = checkpoint.weights_digest([folder / WEIGHTS])
    assert checkpoint.weights_digest([folder / WEIGHTS]) == first
    assert len(read) == 1
    (cached,) = (cache_home / "baton" / "digests").iterdir()
    cached.write_text("not JSON", encoding="utf-8")
    assert checkpoint.weights_digest([folder / WEIGHTS]) == first
    assert len(read) == 2
    rewrite(folder, model__norm__weight=torch.zeros(64))
    assert checkpoint.weights_digest([folder / WEIGHTS]) != first
    assert len(read) == 3
