"""KV between CUDA memory and frames. Part of bench.gpu.

The limit is a pinned copy of 256 MiB between device and host, measured in the same run. A model of
Llama-3-8B's shape: 128 KiB of KV per token.
"""

import json
import subprocess
import sys
import tempfile
import threading

import torch

from baton.kvtransfer.memory import KVMemory
from baton.types import BlockId, KVGroup, KVKind, KVLayout, KVRange
from bench.gpu_report import Limits, Report, seconds, wall_seconds

BLOCK_SIZE, NUM_BLOCKS = 16, 1024
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 32, 8, 128, "bfloat16"),), BLOCK_SIZE)
FRAMES = {"1 MiB": 8, "4 MiB": 32, "16 MiB": 128, "64 MiB": 512}  # tokens


def host_copies() -> tuple[float, float]:
    """Bytes per second of pinned copies, device to host and host to device."""
    device = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    down = seconds(lambda: host.copy_(device, non_blocking=True))
    up = seconds(lambda: device.copy_(host, non_blocking=True))
    return host.numel() / down, host.numel() / up


def make_memory() -> tuple[KVMemory, list[BlockId]]:
    shape = (32, 2, NUM_BLOCKS, BLOCK_SIZE, 8, 128)
    cache = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    order = torch.randperm(NUM_BLOCKS).tolist()
    return KVMemory(cache, LAYOUT), [BlockId(block) for block in order]


def run_frames(memory: KVMemory, block_ids: list[BlockId], report: Report) -> None:
    down, up = host_copies()
    report.line(f"pinned copies: {down / 1e9:.1f} GB/s to the host, {up / 1e9:.1f} GB/s back")
    report.line("| frame | pack GB/s | of the copy | unpack GB/s | of the copy |")
    report.line("|---|---|---|---|---|")
    for name, num_tokens in FRAMES.items():
        with report.attempt(f"frames of {name}"):
            where = KVRange(0, 32, 5, 5 + num_tokens)
            payload = memory.pack(block_ids, where)
            packed = len(payload) / wall_seconds(lambda w=where: memory.pack(block_ids, w))  # type: ignore[misc]
            unpacked = len(payload) / wall_seconds(
                lambda w=where, p=payload: unpack(memory, block_ids, w, p)  # type: ignore[misc]
            )
            report.line(
                f"| {name} | {packed / 1e9:.1f} | {packed / down:.2f} "
                f"| {unpacked / 1e9:.1f} | {unpacked / up:.2f} |"
            )


def unpack(memory: KVMemory, block_ids: list[BlockId], where: KVRange, payload: memoryview) -> None:
    memory.unpack(block_ids, where, payload)
    memory.settle()


def run_beside_compute(memory: KVMemory, block_ids: list[BlockId], report: Report) -> None:
    """What packing on another thread costs the engine's stream, and the other way round."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    where, stop, num_packed = KVRange(0, 32, 0, 32), threading.Event(), 0

    def products() -> None:
        for _ in range(100):
            torch.mm(a, a)

    def pack() -> None:
        nonlocal num_packed
        while not stop.is_set():
            num_packed += len(memory.pack(block_ids, where))

    alone = wall_seconds(products, repeats=3)
    packing = threading.Thread(target=pack)
    packing.start()
    together = wall_seconds(products, repeats=3)
    stop.set()
    packing.join()
    report.line(
        f"products take {together / alone:.3f} times as long beside packing "
        f"({num_packed / (5 * together) / 1e9:.1f} GB/s packed meanwhile)"
    )


def run_two_processes(limits: Limits, report: Report) -> None:
    """Pool to pool; what stays on the device beside a copy within it."""
    with tempfile.NamedTemporaryFile() as figures:
        command = [sys.executable, "-m", "bench.kv_transfer", "--device", "cuda"]
        command += ["--sizes", "1b,16m,256m", "--transports", "cuda,shm,ucx,grpc"]
        command += ["--max-seconds", "30", "--json", figures.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        report.line(done.stdout)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        lines = json.load(figures)
    for line in lines:
        if line["transport"] == "cuda":
            of_copy = line["mb_s"] * 1e6 / (limits.copy_bytes_s / 2)
            report.line(
                f"cuda, {line['row']}, {line['size']} bytes: {of_copy:.3f} of a device copy"
            )


def run(limits: Limits, report: Report) -> None:
    memory, block_ids = make_memory()
    run_frames(memory, block_ids, report)
    with report.attempt("beside compute"):
        run_beside_compute(memory, block_ids, report)
    memory.close()
    with report.attempt("two processes"):
        run_two_processes(limits, report)
