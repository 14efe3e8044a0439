"""Baton on a CUDA device, beside what that device can do.

    python -m bench.gpu [--sections kernels,engine,exchange,fleet]

    kernels   every Triton kernel: equal to its reference, and its rate
    engine    prefill and decode of a model of Llama-3-8B's shape with random weights, with and
              without CUDA graphs
    tiles     the attention kernels with other tiles than theirs; only when asked for
    exchange  pack and unpack through pinned memory, alone and beside compute; pool to pool between
              two processes

Limits (a device copy, a bf16 product, pinned copies to and from the host) are measured in the same
run. A case that fails is told and does not hide the others; exits with 1 then, and if a kernel is
wrong. That tokens are those of the CPU is tested by `TRITON_INTERPRET=0 pytest -m gpu`. Says so and
exits with 0 where there is no CUDA device.
"""

import argparse
import sys
from collections.abc import Callable

import torch

from bench import gpu_engine, gpu_exchange, gpu_fleet, gpu_kernels, gpu_tiles
from bench.gpu_report import Limits, Report, default_log

SECTIONS: dict[str, Callable[[Limits, Report], None]] = {
    "kernels": gpu_kernels.run,
    "tiles": gpu_tiles.run,
    "engine": gpu_engine.run,
    "exchange": gpu_exchange.run,
    "fleet": gpu_fleet.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu")
    parser.add_argument("--sections", default="kernels,engine,exchange,fleet")
    chosen = parser.parse_args().sections.split(",")
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device here, nothing was measured")
        return 0
    torch.manual_seed(0)
    report, limits = Report(default_log()), Limits.measure()
    report.line(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    report.line(
        f"copy {limits.copy_bytes_s / 1e12:.2f} TB/s, "
        f"bf16 product {limits.matmul_flops_s / 1e12:.0f} TFLOP/s"
    )
    for name in chosen:
        with report.section(name):
            SECTIONS[name](limits, report)
    report.line(f"\n{report.num_wrong} things are wrong")
    return 1 if report.num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
