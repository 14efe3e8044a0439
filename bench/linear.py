"""Linear layers of a decode step, by each of the ways in which the libraries at hand compute them.

Weights come from memory (copies of them take turns, in huge pages). Prints GB/s of weights read, in
time of one thread, the best of all repeats; the ways take turns, so that a noisy machine hits all
alike. Ours has the bits of the inner product, and reads the same weights.

    python -m bench.linear [--repeats 8] [--rows 1 2 4 8 16 32]
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.huge_pages import use_huge_pages
from baton.engine.layers.packed_weight import InnerProduct, SkinnyProduct

SHAPES = ((1152, 896), (896, 896), (4864, 896), (896, 4864))  # qkv, o, gate and up, down
WEIGHT_BYTES = 64 << 20  # of all copies of a weight: more than a cache holds


def ways(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each: [num_rows, in_features] → the result, or its transpose."""
    use_huge_pages(weight.data_ptr(), weight.nbytes)
    product, skinny = InnerProduct(weight), SkinnyProduct(weight)
    linear = torch.ops.mkldnn._linear_pointwise
    return {
        "inner product": lambda x: product.pointwise(x, None, "none"),
        "ours": lambda x: skinny.pointwise(x, None, "none"),
        "W xᵀ, oneDNN": lambda x: linear(weight, x, None, "none", [], None),
        "W xᵀ, MKL": lambda x: torch.mm(weight, x.t()),
        "F.linear": lambda x: F.linear(x, weight),
    }


def best(calls: dict[str, list[Callable[[], object]]], repeats: int) -> dict[str, float]:
    """Name → seconds of one call."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, same in calls.items():
            for call in same:
                started = time.thread_time()
                call()
                seconds[name] = min(seconds[name], time.thread_time() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    args = parser.parse_args()
    torch.set_num_threads(1)
    header_is_printed = False
    for shape in SHAPES:
        num_bytes = 4 * shape[0] * shape[1]
        copies = [ways(torch.randn(shape)) for _ in range(WEIGHT_BYTES // num_bytes)]
        if not header_is_printed:
            print("| layer | rows |", " | ".join(copies[0]), "|")
            print("|---|---|" + "---|" * len(copies[0]))
            header_is_printed = True
        for num_rows in args.rows:
            x = torch.randn(num_rows, shape[1])
            calls = {
                name: [lambda way=copy[name], x=x: way(x) for copy in copies] for name in copies[0]
            }
            rates = (num_bytes / s / 1e9 for s in best(calls, args.repeats).values())
            cells = " | ".join(f"{rate:.1f}" for rate in rates)
            print(f"| {shape[1]} → {shape[0]} | {num_rows} | {cells} |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
