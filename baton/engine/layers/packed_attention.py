"""Attention within each of the sequences that a step packs one behind the other. Nothing is kept of
them, so there is no pool, and a sequence may look both ways."""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.layers.attention import StepAttention


class PackedAttention:
    """Sequences of one length are one call, without padding: they must lie side by side."""

    def __init__(self, windows: Sequence[int], *, causal: bool) -> None:
        """
        Args:
            windows: per layer: tokens that a query sees, itself included; 0 = all.
            causal: a query sees nothing behind it.
        """
        assert causal or not any(windows), "windows look back"
        self._windows = windows
        self._causal = causal

    def plan(self, lengths: Sequence[int], device: torch.device) -> StepAttention:
        """
        Args:
            lengths: of the step's sequences, in order.
        """
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        masks = {
            (length, window): _window_mask(length, window, device)
            for length, _ in runs
            for window in set(self._windows)
            if 0 < window < length
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            window, start, seen = self._windows[layer], 0, []
            for length, count in runs:
                part = slice(start, start := start + length * count)
                mask = masks.get((length, window))
                heads = F.scaled_dot_product_attention(
                    _heads(q[part], count, q.shape[1]),
                    _heads(k[part], count, q.shape[1]),
                    _heads(v[part], count, q.shape[1]),
                    attn_mask=mask,
                    is_causal=self._causal and mask is None,
                )
                seen.append(heads.transpose(1, 2).reshape(length * count, -1))
            return seen[0] if len(seen) == 1 else torch.cat(seen)

        return attend


def _heads(x: Tensor, count: int, num_heads: int) -> Tensor:
    """[count * length, heads, head_dim] → [count, num_heads, length, head_dim]."""
    apart = x.view(count, -1, *x.shape[1:]).transpose(1, 2)
    return apart.repeat_interleave(num_heads // x.shape[1], dim=1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length] bool: True = seen."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)
