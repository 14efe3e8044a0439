"""Every Triton kernel on a CUDA machine: equal to its reference, and how close to the roofline.

    python -m bench.gpu

The roofline is measured in the same run: bytes per second of a device copy, FLOPs per second of a
bf16 matrix product. Exits with 1 if a kernel is wrong; says so and exits with 0 where there is no
CUDA device.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.kv_pack import pack_kv, pack_kv_torch, payload_bytes, unpack_kv, unpack_kv_torch
from baton.kernels.kv_store import kv_store, kv_store_torch
from baton.kernels.paged_attention import (
    paged_decode,
    paged_decode_torch,
    paged_prefill,
    paged_prefill_torch,
)
from baton.kernels.rms_norm import rms_norm, rms_norm_torch
from baton.kernels.rope import rope, rope_torch
from baton.kernels.sampling import gumbel_argmax, gumbel_argmax_torch
from baton.types import KVRange

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, BLOCK_SIZE, VOCAB = 32, 8, 128, 4096, 16, 151_936
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size. `work`: bytes it must move, or FLOPs it must do."""

    name: str
    kernel: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    tolerance: float
    work: float
    is_compute: bool = False


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time on the device."""
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


def roofline() -> tuple[float, float]:
    """(bytes/s of a copy, reads and writes counted; FLOP/s of a bf16 product)."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return copied, 2 * 8192**3 / seconds(lambda: a @ a)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def layer_cases(dtype: torch.dtype) -> list[Case]:
    num_tokens, tolerance = 4096, TOLERANCE[dtype]
    x, weight = normal(num_tokens, HIDDEN, dtype=dtype), normal(HIDDEN, dtype=dtype)
    heads = normal(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype)
    qk = heads[:, : HEADS + KV_HEADS]
    k, v = heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]
    cos_sin = torch.rand(num_tokens, 2, HEAD_DIM, device="cuda")
    cache = torch.zeros(2, 1024, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
    slots = torch.randperm(1024 * BLOCK_SIZE, device="cuda")[:num_tokens]

    def store(op: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> Tensor:
        op(k, v, cache, slots)
        return cache

    return [
        Case(
            "rms_norm",
            lambda: rms_norm(x, weight, 1e-6),
            lambda: rms_norm_torch(x, weight, 1e-6),
            tolerance,
            2.0 * x.numel() * dtype.itemsize,
        ),
        Case(
            "rope",
            lambda: rope(qk, cos_sin),
            lambda: rope_torch(qk, cos_sin),
            tolerance,
            2.0 * qk.numel() * dtype.itemsize + cos_sin.numel() * 4,
        ),
        Case(
            "kv_store",
            lambda: store(kv_store),
            lambda: store(kv_store_torch).clone(),
            0.0,
            4.0 * k.numel() * dtype.itemsize,
        ),
    ]


def paged(lens: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(cache, block table, context lengths) with blocks in random places."""
    widths = [-(-length // BLOCK_SIZE) for length in lens]
    order = torch.randperm(sum(widths), device="cuda").int()
    table = torch.zeros(len(lens), max(widths), dtype=torch.int32, device="cuda")
    for row, blocks in enumerate(order.split(widths)):
        table[row, : len(blocks)] = blocks
    cache = normal(2, sum(widths), BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype)
    return cache, table, torch.tensor(lens, dtype=torch.int32, device="cuda")


def decode_case(lens: Sequence[int], dtype: torch.dtype, window: int = 0) -> Case:
    cache, table, context_lens = paged(lens, dtype)
    q = normal(len(lens), HEADS, HEAD_DIM, dtype=dtype)
    seen = sum(min(length, window or length) for length in lens)
    arguments = (q, cache, table, context_lens, HEAD_DIM**-0.5, window)
    return Case(
        f"paged_decode {len(lens)}x{max(lens)}" + (f" window {window}" if window else ""),
        lambda: paged_decode(*arguments),
        lambda: paged_decode_torch(*arguments),
        TOLERANCE[dtype],
        2.0 * seen * KV_HEADS * HEAD_DIM * dtype.itemsize,
    )


def prefill_case(
    starts_and_lens: Sequence[tuple[int, int]], dtype: torch.dtype, window: int = 0
) -> Case:
    """(cached tokens, new tokens) of each row."""
    cache, table, context_lens = paged([start + n for start, n in starts_and_lens], dtype)
    num_queries = [n for _, n in starts_and_lens]
    bounds = torch.tensor([0, *num_queries]).cumsum(0).int().cuda()
    q = normal(sum(num_queries), HEADS, HEAD_DIM, dtype=dtype)
    pairs = sum(
        min(position + 1, window or position + 1)
        for start, n in starts_and_lens
        for position in range(start, start + n)
    )
    longest, scale = max(num_queries), HEAD_DIM**-0.5
    arguments = (q, cache, bounds, table, context_lens, longest, scale, window)
    shape = "+".join(f"{n}@{start}" for start, n in starts_and_lens)
    return Case(
        f"paged_prefill {shape}" + (f" window {window}" if window else ""),
        lambda: paged_prefill(*arguments),
        lambda: paged_prefill_torch(*arguments),
        TOLERANCE[dtype],
        4.0 * pairs * HEADS * HEAD_DIM,
        is_compute=True,
    )


def transfer_cases(dtype: torch.dtype) -> list[Case]:
    num_layers, num_blocks = 16, 512
    shape = (num_layers, 2, num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    cache, target = normal(*shape, dtype=dtype), torch.zeros(shape, dtype=dtype, device="cuda")
    block_ids = torch.randperm(num_blocks)[: num_blocks // 2].tolist()
    where = KVRange(0, num_layers, 5, len(block_ids) * BLOCK_SIZE - 3)
    wire = torch.empty(payload_bytes(cache, where), dtype=torch.uint8, device="cuda")
    pack_kv_torch(cache, block_ids, where, wire)
    payload = wire.clone()

    def pack(op: Callable[..., None]) -> Tensor:
        op(cache, block_ids, where, wire)
        return wire

    def unpack(op: Callable[..., None]) -> Tensor:
        op(target, block_ids, where, payload)
        return target

    work = 2.0 * payload.numel()
    return [
        Case("pack_kv", lambda: pack(pack_kv), lambda: pack(pack_kv_torch).clone(), 0.0, work),
        Case(
            "unpack_kv",
            lambda: unpack(unpack_kv),
            lambda: unpack(unpack_kv_torch).clone(),
            0.0,
            work,
        ),
    ]


def sampling_case() -> Case:
    logits = normal(64, VOCAB, dtype=torch.float32) * 3
    temperatures = torch.rand(64, device="cuda").mul_(2).round_(decimals=1)
    keys = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32, device="cuda")
    return Case(
        f"gumbel_argmax 64x{VOCAB}",
        lambda: gumbel_argmax(logits, temperatures, keys),
        lambda: gumbel_argmax_torch(logits, temperatures, keys),
        0.0,
        4.0 * logits.numel(),
    )


def cases(dtype: torch.dtype) -> list[Case]:
    return [
        *layer_cases(dtype),
        decode_case([4096] * 64, dtype),
        decode_case([1, 17, 300, 33_000], dtype),
        decode_case([8192] * 8, dtype, window=1024),
        prefill_case([(0, 4096)], dtype),
        prefill_case([(3000, 512), (0, 1), (16, 77), (0, 130)], dtype),
        prefill_case([(2000, 1000)], dtype, window=512),
        *transfer_cases(dtype),
    ]


def check(case: Case) -> tuple[bool, float]:
    """Whether the kernel equals its reference, and the largest difference."""
    expected, got = case.reference(), case.kernel()
    if case.tolerance == 0.0:
        return torch.equal(got, expected), float("nan")
    error = (got.float() - expected.float()).abs().max().item()
    return error <= case.tolerance, error


def run(chosen: Sequence[Case], dtype: str, peaks: tuple[float, float]) -> bool:
    is_right = True
    for case in chosen:
        right, error = check(case)
        is_right &= right
        rate = case.work / seconds(case.kernel)
        peak, unit = (peaks[1], "TFLOP/s") if case.is_compute else (peaks[0], "TB/s")
        print(
            f"| {case.name} | {dtype} | {'ok' if right else 'WRONG'} | {error:.1e} "
            f"| {rate / 1e12:.2f} {unit} | {rate / peak:.2f} |",
            flush=True,
        )
    return is_right


def main() -> int:
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device here, nothing was measured")
        return 0
    torch.manual_seed(0)
    peaks = roofline()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"copy {peaks[0] / 1e12:.2f} TB/s, bf16 product {peaks[1] / 1e12:.0f} TFLOP/s\n")
    print("| kernel | dtype | equal | max error | rate | of the roofline |")
    print("| --- | --- | --- | --- | --- | --- |")
    is_right = True
    for dtype in TOLERANCE:
        is_right &= run(cases(dtype), str(dtype).removeprefix("torch."), peaks)
    is_right &= run([sampling_case()], "float32", peaks)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
