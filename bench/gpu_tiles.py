"""Which tiles the attention kernels are fastest with on this device: what `tiles_for` should say.
Part of bench.gpu, when asked for."""

from collections.abc import Callable
from types import ModuleType

import torch

from baton.kernels import paged_decode_triton, paged_prefill_triton
from bench import gpu_kernels
from bench.gpu_report import Limits, Report, graph_seconds

PREFILL = [
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 4),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (128, 64, 4, 3),
    (128, 32, 8, 4),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 128, 4, 3),
]
DECODE = [(64, 4, 3), (64, 4, 4), (64, 2, 3), (32, 4, 3), (32, 2, 4), (128, 4, 3), (128, 8, 3)]
DTYPE = torch.bfloat16


def measure(
    module: ModuleType,
    candidates: list[tuple[int, ...]],
    make: Callable[[], gpu_kernels.Case],
    report: Report,
) -> None:
    case, in_use = make(), module.tiles_for
    chosen = in_use(gpu_kernels.HEAD_DIM, DTYPE)
    try:
        for values in candidates:
            tiles = module.Tiles(*values)
            module.tiles_for = lambda dims, dtype, tiles=tiles: tiles  # type: ignore[misc]
            with report.attempt(f"{case.name} {values}"):
                right, error = gpu_kernels.check(case)
                took = graph_seconds(case.kernel)
                mark = "in use" if tiles == chosen else ""
                report.line(f"| {case.name} | {values} | {took * 1e3:.3f} | {mark} |")
                if not right:
                    report.wrong(f"{case.name} {values} differs by {error:.1e}")
    finally:
        module.tiles_for = in_use  # type: ignore[attr-defined]


def run(limits: Limits, report: Report) -> None:
    report.line("| kernel | tiles | ms | |")
    report.line("|---|---|---|---|")
    for lens in ([4096] * 64, [8000] * 8, [32_000]):
        measure(
            paged_decode_triton,
            DECODE,
            lambda lens=lens: gpu_kernels.decode_case(lens, DTYPE),  # type: ignore[misc]
            report,
        )
    for chunk in (0, 4096), (6000, 2048):
        measure(
            paged_prefill_triton,
            PREFILL,
            lambda chunk=chunk: gpu_kernels.prefill_case([chunk], DTYPE),  # type: ignore[misc]
            report,
        )
