"""Rotary position embedding (Su et al., 2021), with linear and Llama-3 frequency scaling."""

import math

import torch
from torch import Tensor

from baton.engine.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float32: radians per position of each rotated pair."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _scale_llama3(frequencies, rope)
    return frequencies


def _scale_llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated
    (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    shortest_stretched = rope.original_max_len / rope.low_freq_factor
    longest_kept = rope.original_max_len / rope.high_freq_factor
    kept = (rope.original_max_len / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - kept) * frequencies / rope.factor + kept * frequencies
    scaled = torch.where(wavelengths > shortest_stretched, frequencies / rope.factor, frequencies)
    is_between = (wavelengths >= longest_kept) & (wavelengths <= shortest_stretched)
    return torch.where(is_between, between, scaled)


class Rotary:
    """cos and sin of every position below `max_len`: a table, so that a position's values never
    depend on what else is in the step."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_len: int, device: torch.device) -> None:
        positions = torch.arange(max_len, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(rope, head_dim)
        # [max_len, 2, head_dim / 2] float32
        self._table = torch.stack((angles.cos(), angles.sin()), dim=1).to(device)

    def __call__(self, positions: Tensor) -> Tensor:
        """positions: [num_tokens] int64 → [num_tokens, 2, head_dim] float32, see `kernels.rope`."""
        cos, sin = self._table[positions].unbind(1)
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
