"""Every Triton kernel: equal to its reference, and how close to the roofline. Part of bench.gpu."""

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
from baton.kernels.payload_digest import payload_digests, payload_digests_torch
from baton.kernels.rms_norm import rms_norm, rms_norm_torch
from baton.kernels.rope import rope, rope_torch
from baton.kernels.sampling import gumbel_argmax, gumbel_argmax_torch
from baton.kernels.silu_mul import silu_mul, silu_mul_torch
from baton.types import KVRange
from bench.gpu_report import Limits, Report, graph_seconds, seconds

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
    is_captured: bool = True  # timed in a CUDA graph, as decode steps run


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def layer_cases(dtype: torch.dtype) -> list[Case]:
    num_tokens, tolerance = 16384, TOLERANCE[dtype]  # more than the caches hold
    x, weight = normal(num_tokens, HIDDEN, dtype=dtype), normal(HIDDEN, dtype=dtype)
    heads = normal(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype)
    qk = heads[:, : HEADS + KV_HEADS]
    k, v = heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]
    cos, sin = torch.rand(2, num_tokens, HEAD_DIM // 2, device="cuda")
    cos_sin = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), dim=1)
    cache = torch.zeros(2, 2048, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
    slots = torch.randperm(2048 * BLOCK_SIZE, device="cuda")[:num_tokens]

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
            "silu_mul",
            lambda: silu_mul(x),
            lambda: silu_mul_torch(x),
            tolerance * 4,
            1.5 * x.numel() * dtype.itemsize,
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
        Case(
            "pack_kv",
            lambda: pack(pack_kv),
            lambda: pack(pack_kv_torch).clone(),
            0.0,
            work,
            is_captured=False,  # it uploads block ids
        ),
        Case(
            "unpack_kv",
            lambda: unpack(unpack_kv),
            lambda: unpack(unpack_kv_torch).clone(),
            0.0,
            work,
            is_captured=False,
        ),
        Case(
            "payload_digests",
            lambda: payload_digests([payload]),
            lambda: payload_digests_torch([payload]),
            0.0,
            float(payload.numel()),
        ),
    ]


def sampling_case() -> Case:
    logits = normal(64, VOCAB, dtype=torch.float32) * 3
    temperatures = torch.rand(64, device="cuda").mul_(2).round_(decimals=1)
    keys = torch.randint(0, 2**32, (64,), device="cuda")
    return Case(
        f"gumbel_argmax 64x{VOCAB}",
        lambda: gumbel_argmax(logits, temperatures, keys),
        lambda: gumbel_argmax_torch(logits, temperatures, keys),
        0.0,
        4.0 * logits.numel(),
    )


def makers(dtype: torch.dtype) -> list[Callable[[], list[Case]]]:
    """Made one after the other: together they would not fit into a small device's memory."""
    return [
        lambda: layer_cases(dtype),
        lambda: [decode_case([4096] * 64, dtype)],
        lambda: [decode_case([4096] * 100, dtype)],  # does not divide by anything
        lambda: [decode_case([32_000], dtype)],
        lambda: [decode_case([1, 17, 300, 33_000], dtype)],
        lambda: [decode_case([8192] * 64, dtype, window=1024)],
        lambda: [prefill_case([(0, 4096)], dtype)],
        lambda: [prefill_case([(3000, 512), (0, 1), (16, 77), (0, 130)], dtype)],
        lambda: [prefill_case([(2000, 1000)], dtype, window=512)],
        lambda: transfer_cases(dtype),
    ]


def check(case: Case) -> tuple[bool, float]:
    """Whether the kernel equals its reference, and the largest difference."""
    expected, got = case.reference(), case.kernel()
    if case.tolerance == 0.0:
        return torch.equal(got, expected), float("nan")
    error = (got.float() - expected.float()).abs().max().item()
    return error <= case.tolerance, error


def measure(case: Case, dtype: str, limits: Limits, report: Report) -> None:
    right, error = check(case)
    rate = case.work / (graph_seconds if case.is_captured else seconds)(case.kernel)
    peak, unit = limits.copy_bytes_s, "TB/s"
    if case.is_compute:
        peak, unit = limits.matmul_flops_s, "TFLOP/s"
    report.line(
        f"| {case.name} | {dtype} | {error:.1e} | {rate / 1e12:.2f} {unit} | {rate / peak:.2f} |"
    )
    if not right:
        report.wrong(f"{case.name} {dtype}: differs from its reference by {error:.1e}")


def run(limits: Limits, report: Report) -> None:
    report.line("| kernel | dtype | max error | rate | of the limit |")
    report.line("|---|---|---|---|---|")
    for dtype in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        for make in makers(dtype):
            with report.attempt(f"{getattr(make, '__name__', 'a case')} {name}"):
                for case in make():
                    with report.attempt(f"{case.name} {name}"):
                        measure(case, name, limits, report)
    with report.attempt("gumbel_argmax"):
        measure(sampling_case(), "float32", limits, report)
