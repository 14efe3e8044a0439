"""Log-probabilities of chosen tokens and of the likeliest ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.sampling import pack, unpack_ids
from baton.kernels.sampling_cpu import in_order, likeliest
from baton.types import Logprobs


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of row `row`: the log-probabilities of `token_id`, of the `num_top` likeliest tokens that can
    be, and of further tokens."""

    row: int
    token_id: int
    num_top: int
    asked_ids: tuple[int, ...] = ()


def token_logprobs(logits: Tensor, wanted: Sequence[Wanted]) -> list[Logprobs]:
    """Natural logs of softmax(logits).

    Args:
        logits: [num_rows, vocab_size] float32, contiguous, rows with a finite maximum.
    """
    if logits.device.type == "cpu":
        rows = logits.numpy()
        return [_logprobs_cpu(rows[w.row], w) for w in wanted]
    return token_logprobs_torch(logits, wanted)


def _logprobs_cpu(row: npt.NDArray[np.float32], wanted: Wanted) -> Logprobs:
    top = row.max()
    norm = float(top) + math.log(float(np.exp(row - top).sum(dtype=np.float64)))
    own = row[wanted.token_id]
    ids = in_order(row, likeliest(row, max(wanted.num_top, 1))[0])[: wanted.num_top]
    return Logprobs(
        logprob=float(own) - norm,
        rank=int(np.count_nonzero(row > own)) + 1,
        top=tuple((int(i), float(row[i]) - norm) for i in ids if row[i] > -np.inf),
        asked=tuple((i, float(row[i]) - norm) for i in wanted.asked_ids),
    )


def token_logprobs_torch(logits: Tensor, wanted: Sequence[Wanted]) -> list[Logprobs]:
    """`token_logprobs` on any device."""
    if not wanted:
        return []
    rows = logits[[w.row for w in wanted]]
    token_ids = torch.tensor([w.token_id for w in wanted], device=logits.device)
    top = rows.amax(-1, keepdim=True)
    norm = top[:, 0].double() + (rows - top).exp().sum(-1, dtype=torch.float64).log()
    own = rows.gather(-1, token_ids[:, None])
    ranks = (rows > own).sum(-1) + 1
    num_top = min(max(w.num_top for w in wanted), rows.shape[1])
    packed = pack(rows, torch.arange(rows.shape[1], device=rows.device))
    best_ids = unpack_ids(packed.topk(num_top, dim=-1).values)
    best = (rows.gather(-1, best_ids).double() - norm[:, None]).tolist()
    at = [(row, token_id) for row, w in enumerate(wanted) for token_id in w.asked_ids]
    asked = iter(_pick(rows, norm, at))
    columns = ((own[:, 0].double() - norm).tolist(), ranks.tolist(), best_ids.tolist(), best)
    return [
        Logprobs(
            logprob,
            rank,
            tuple((i, v) for i, v in zip(ids[: w.num_top], values, strict=False) if v > -math.inf),
            tuple((i, next(asked)) for i in w.asked_ids),
        )
        for w, logprob, rank, ids, values in zip(wanted, *columns, strict=True)
    ]


def _pick(rows: Tensor, norm: Tensor, at: Sequence[tuple[int, int]]) -> list[float]:
    """rows[row, token id] - norm[row] of every pair."""
    if not at:
        return []
    row, token_id = torch.tensor(at, device=rows.device).unbind(1)
    values: list[float] = (rows[row, token_id].double() - norm[row]).tolist()
    return values
