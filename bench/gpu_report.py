"""What the CUDA benches share: timing, the machine's limits, and a table that survives failures."""

import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Limits:
    """Of this device, measured in this run."""

    copy_bytes_s: float  # of a device copy, reads and writes counted
    matmul_flops_s: float  # of a bf16 product

    @classmethod
    def measure(cls) -> "Limits":
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copied = 2 * source.numel() / seconds(lambda: target.copy_(source))
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        return cls(copied, 2 * 8192**3 / seconds(lambda: a @ a))


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time on the device. The first calls, which compile, are not counted."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def graph_seconds(call: Callable[[], object], num_calls: int = 5) -> float:
    """Median time on the device of one of several calls in a CUDA graph: what launching takes the
    processor does not count. `call` must not copy from ordinary host memory."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(num_calls):
            call()
    return seconds(graph.replay) / num_calls


def wall_seconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Median time until the device is done, as a host clock sees it."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


@dataclass(slots=True)
class Report:
    """Prints rows as they come; counts what is wrong. Tracebacks go to the log file, if any."""

    log: Path | None
    num_wrong: int = 0
    _started: float = field(default_factory=time.monotonic)

    def line(self, text: str) -> None:
        print(text, flush=True)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                print(text, file=file)

    def wrong(self, text: str) -> None:
        self.num_wrong += 1
        self.line(f"| WRONG | {text} |")

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails inside is told and counted, and the bench goes on with the next."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - one case must not hide the others
            self.wrong(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            details = "".join(traceback.format_exception(error))
            print(details[-1500:], file=sys.stderr, flush=True)
            if self.log is not None:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(details)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self.line(f"\n## {name}")
        started = time.monotonic()
        with self.attempt(name):
            yield
        torch.cuda.empty_cache()
        self.line(f"({name}: {time.monotonic() - started:.0f} s)")


def default_log() -> Path | None:
    """$OUT/gpu.log, where somebody collects files."""
    return Path(os.environ["OUT"], "gpu.log") if os.environ.get("OUT") else None
