"""Which tokens may be chosen at all, as bits: 32 token ids per int32, lower ids in lower bits.

Bits travel to a GPU in a 32nd of the bytes that logits would take.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bits = npt.NDArray[np.int32]


def num_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def bits_of(token_ids: Iterable[int], vocab_size: int) -> Bits:
    """[num_words(vocab_size)] int32 with the bits of `token_ids` set; ids are below vocab_size."""
    is_set = np.zeros(num_words(vocab_size) * 32, np.uint8)
    is_set[np.fromiter(token_ids, np.int64)] = 1
    return np.packbits(is_set, bitorder="little").view(np.int32)


def mask_rows(logits: Tensor, rows: Sequence[int], bits: Bits) -> None:
    """Set every logit of rows[i] whose bit in bits[i] is 0 to -inf, in place.

    Args:
        logits: [num_rows, vocab_size] float32, contiguous.
        rows: distinct.
        bits: [len(rows), num_words(vocab_size)].
    """
    if logits.device.type == "cpu":
        table, vocab_size = logits.numpy(), logits.shape[1]
        for row, words in zip(rows, bits, strict=True):
            allowed = np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little")
            np.putmask(table[row], allowed == 0, -np.inf)
        return
    mask_rows_torch(logits, rows, bits)


def mask_rows_torch(logits: Tensor, rows: Sequence[int], bits: Bits) -> None:
    """`mask_rows` on any device."""
    words = torch.from_numpy(bits).to(logits.device, non_blocking=True)
    place = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((words[:, :, None] >> place) & 1).flatten(1)[:, : logits.shape[1]]
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill(allowed == 0, -torch.inf)
