"""What the Triton kernels become on a GPU, without one: registers, spills, shared memory, matrix
instructions.

    TRITON_INTERPRET=0 python -m bench.kernel_resources [--arch 90] [--head-dims 64,128]

Triton brings its own assembler and disassembler, so every launch of `baton.kernels` is compiled as
it would be there. Exits with 1 if a kernel does not compile, spills registers, needs more shared
memory than the architecture has, or computes float32 with less than float32.
"""

import argparse
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.kernels import (
    kv_pack_triton,
    kv_store_triton,
    paged_decode_triton,
    paged_prefill_triton,
    rms_norm_triton,
    rope_triton,
    sampling_triton,
    silu_mul_triton,
)
from baton.kernels.kv_pack import payload_bytes
from baton.types import KVRange

MODULES = (
    kv_pack_triton,
    kv_store_triton,
    paged_decode_triton,
    paged_prefill_triton,
    rms_norm_triton,
    rope_triton,
    sampling_triton,
    silu_mul_triton,
)
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # of one program
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
BINARIES = Path(inspect.getfile(triton)).parent / "backends/nvidia/bin"
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands in for a kernel: `kernel[grid](…)` writes the launch down instead."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: self._launches.append((self._kernel, args, kwargs))


def record(modules: tuple[ModuleType, ...], launches: list[Launch]) -> None:
    for module in modules:
        for name, value in list(vars(module).items()):
            # Not what a kernel calls: that is compiled into it.
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                setattr(module, name, Recorder(value, launches))


@dataclass(frozen=True, slots=True)
class Resources:
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    num_spills: int  # loads and stores of local memory
    matrix: str  # "HGMMA 12": the matrix instructions, and how many of them
    is_tf32: bool


def compile_launch(launch: Launch, arch: int) -> Resources:
    kernel, args, kwargs = launch
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constexprs: dict[tuple[int, ...], object] = {}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[object]]] = {}
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        is_tensor = isinstance(value, torch.Tensor)
        is_one = not is_tensor and value == 1 and not param.do_not_specialize
        if param.is_constexpr or is_one:
            signature[param.name], constexprs[index,] = "constexpr", value
            continue
        signature[param.name] = TYPES[value.dtype] if is_tensor else _scalar(value)
        if param.do_not_specialize or param.do_not_specialize_on_alignment:
            continue
        if is_tensor or (isinstance(value, int) and value % 16 == 0):
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, aligned)
    return _resources(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def _scalar(value: float) -> str:
    return "fp32" if isinstance(value, float) else "i32"


def _resources(compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    matrix = [
        f"{name} {count}" for name in ("HGMMA", "HMMA") if (count := _count(rf"\b{name}\b", sass))
    ]
    return Resources(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        num_spills=_count(r"\b(LDL|STL)\b", sass),
        matrix=", ".join(matrix),
        is_tf32="tf32" in compiled.asm["ptx"],
    )


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([BINARIES / tool, *args], capture_output=True, text=True, check=True)
    return done.stdout


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def launches(head_dims: list[int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of every kernel, as a step makes them."""
    int32, int64 = torch.int32, torch.int64
    table, lens = torch.zeros(64, 256, dtype=int32), torch.ones(64, dtype=int32)
    starts, slots = torch.zeros(65, dtype=int32), torch.zeros(64, dtype=int64)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for dim in head_dims:
            q, k = torch.zeros(64, 32, dim, dtype=dtype), torch.zeros(64, 8, dim, dtype=dtype)
            cache = torch.zeros(2, 64, 16, 8, dim, dtype=dtype)
            decode, prefill = (
                (q, cache, table, lens, 1.0),
                (q, cache, starts, table, lens, 512, 1.0),
            )
            yield (
                f"decode {dim} {name}",
                lambda a=decode: paged_decode_triton.paged_decode_triton(*a),
            )
            yield (
                f"prefill {dim} {name}",
                lambda a=prefill: paged_prefill_triton.paged_prefill_triton(*a),
            )
            yield (
                f"rope {dim} {name}",
                lambda q=q, d=dim: rope_triton.rope_triton(q, torch.zeros(64, 2, d)),
            )
            yield (
                f"kv_store {dim} {name}",
                lambda k=k, c=cache: kv_store_triton.kv_store_triton(k, k, c, slots),
            )
        x = torch.zeros(64, 4096, dtype=dtype)
        yield f"rms_norm {name}", lambda x=x: rms_norm_triton.rms_norm_triton(x, x[0], 1e-6)
        yield f"silu_mul {name}", lambda x=x: silu_mul_triton.silu_mul_triton(x)
    pool, where = torch.zeros(4, 2, 64, 16, 8, 128, dtype=torch.bfloat16), KVRange(0, 4, 5, 100)
    wire = torch.zeros(payload_bytes(pool, where), dtype=torch.uint8)
    for pack in (True, False):
        yield (
            "pack_kv" if pack else "unpack_kv",
            lambda p=pack: kv_pack_triton.copy_kv_triton(pool, range(8), where, wire, pack=p),
        )
    logits, column = torch.zeros(64, 151936), torch.zeros(64)
    yield (
        "gumbel_argmax",
        lambda: sampling_triton.gumbel_argmax_triton(logits, column, column.long()),
    )


def faults(name: str, used: Resources, arch: int) -> list[str]:
    found = []
    if used.num_spills or used.stack_bytes:
        found.append(f"spills ({used.num_spills} loads and stores)")
    if used.shared_bytes > SHARED_BYTES[arch]:
        found.append(f"{used.shared_bytes} bytes of shared memory")
    if used.is_tf32 and "float32" in name:
        found.append("tf32")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.kernel_resources")
    parser.add_argument("--arch", type=int, default=90, choices=SHARED_BYTES)
    parser.add_argument("--head-dims", default="64,128")
    arguments = parser.parse_args()
    recorded: list[Launch] = []
    record(MODULES, recorded)
    num_wrong = 0
    print("| kernel | registers | warps | shared KiB | matrix | |")
    print("|---|---|---|---|---|---|")
    for name, launch in launches([int(dim) for dim in arguments.head_dims.split(",")]):
        recorded.clear()
        launch()
        for kernel in recorded:
            used = compile_launch(kernel, arguments.arch)
            wrong = faults(name, used, arguments.arch)
            num_wrong += bool(wrong)
            print(
                f"| {name} {kernel[0].__name__} | {used.registers} | {used.num_warps} "
                f"| {used.shared_bytes / 1024:.1f} | {used.matrix} | {', '.join(wrong) or 'ok'} |",
                flush=True,
            )
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
