"""The KV pool: one tensor for all layers and blocks.

On CPU it is a mapping of its own in huge pages, where the kernel has them (fewer TLB misses where
blocks lie apart), and what no block has touched yet costs no memory. The tensor is never resized or
moved.
"""

import mmap
from contextlib import suppress
from math import prod

import torch

from baton.engine.model_config import ModelConfig
from baton.types import KVGroup, KVKind, KVLayout


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def kv_layout(config: ModelConfig, block_size: int, dtype: torch.dtype) -> KVLayout:
    """The layout that this model's KV has on the wire and in tickets."""
    window = config.windows[0] if len(set(config.windows)) == 1 else 0
    group = KVGroup(
        kind=KVKind.WINDOW if window else KVKind.FULL,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype_name(dtype),
        window=window,
    )
    return KVLayout((group,), block_size)


class KVCache:
    """`tensor`: [num_layers, 2 (K, V), num_blocks, block_size, num_kv_heads, head_dim], zeros at
    first.

    K is stored after RoPE. A token's slot is block_id * block_size + offset.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        (group,) = layout.groups
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (
            group.num_layers,
            2,
            num_blocks,
            layout.block_size,
            group.num_kv_heads,
            group.head_dim,
        )
        dtype: torch.dtype = getattr(torch, group.dtype)
        if device.type == "cpu":
            self.tensor = _map(shape, dtype)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks (source, target) in all layers; targets are distinct. Every source is
        read before any target is written."""
        if copies:
            source, target = torch.tensor(copies, device=self.tensor.device).unbind(1)
            self.tensor[:, :, target] = self.tensor[:, :, source]


def _map(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    buffer = mmap.mmap(-1, prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
