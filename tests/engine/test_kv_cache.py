"""The KV pool: one tensor."""

import re
from pathlib import Path

import pytest
import torch

from baton.engine.kv_cache import KVCache, kv_layout
from baton.engine.model_config import parse_model_config
from baton.types import KVKind
from tests.engine.test_model_config import BASE


@pytest.fixture
def cache() -> KVCache:
    layout = kv_layout(parse_model_config(BASE), 16, torch.bfloat16)
    return KVCache(layout, 10, torch.device("cpu"))


def test_shape_and_sizes(cache: KVCache) -> None:
    assert cache.tensor.shape == (2, 2, 10, 16, 4, 16)
    assert cache.tensor.dtype is torch.bfloat16
    assert cache.tensor.is_contiguous()
    assert not cache.tensor.any()
    assert cache.layout.token_bytes == 2 * 2 * 4 * 16 * 2
    assert cache.num_bytes == 10 * 16 * cache.layout.token_bytes


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)
def test_the_kernel_may_use_huge_pages(cache: KVCache) -> None:
    address, flags = cache.tensor.data_ptr(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_inside and line.startswith("VmFlags:"):
            flags = line
    assert " hg" in flags


def test_blocks_are_copied_in_every_layer(cache: KVCache) -> None:
    cache.tensor.normal_()
    before = cache.tensor.clone()
    cache.copy_blocks(((2, 7), (2, 0), (9, 1)))
    for source, target in ((2, 7), (2, 0), (9, 1)):
        assert torch.equal(cache.tensor[:, :, target], before[:, :, source])
    for kept in (2, 3, 4, 5, 6, 8, 9):
        assert torch.equal(cache.tensor[:, :, kept], before[:, :, kept])


@pytest.mark.parametrize(
    ("windows", "kind", "window"), [((9, 9), KVKind.WINDOW, 9), ((0, 9), KVKind.FULL, 0)]
)
def test_layout_of_windows(windows: tuple[int, int], kind: KVKind, window: int) -> None:
    kinds = ["sliding_attention" if size else "full_attention" for size in windows]
    config = parse_model_config(
        {
            **BASE,
            "architectures": ["Qwen2ForCausalLM"],
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": kinds,
        }
    )
    (group,) = kv_layout(config, 32, torch.float16).groups
    assert (group.kind, group.window, group.dtype, group.num_layers) == (kind, window, "float16", 2)
