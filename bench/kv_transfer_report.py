"""What `bench.kv_transfer` prints: a line per row as it is measured, then the table for
docs/performance.md and whether the targets hold."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

MIB = 1 << 20
TRANSPORT, POOL, EMPTY = "transport", "pool to pool", "empty call"
COPIES = "copies alone"  # pool to pool without a protocol

_FROM_BYTES = 15 * MIB  # targets hold from 16 MiB on; sizes are whole tokens
_TARGETS = (  # of which row of which transport, against which limit
    ("ucx", TRANSPORT, "of_tcp", 0.7),
    ("grpc", TRANSPORT, "of_tcp", 0.45),
    ("shm", TRANSPORT, "of_memcpy", 0.5),
    ("ucx", POOL, "of_tcp", 0.5),
    ("grpc", POOL, "of_tcp", 0.35),
    ("shm", POOL, "of_memcpy", 0.3),
)
_MAX_CALLS = 4.0  # a hand-off of one block, in empty calls
_LIMITS = {"of_tcp": "bare TCP", "of_memcpy": "memcpy"}
_COLUMNS = (
    ("best_ms", "best ms", 9, 2),
    ("median_ms", "median", 9, 2),
    ("mb_s", "MB/s", 7, 0),
    ("of_tcp", "of TCP", 8, 2),
    ("of_memcpy", "of memcpy", 11, 2),
    ("frames_s", "frames/s", 10, 0),
    ("cpu_s_gib", "CPU s/GiB", 11, 2),
)

Line = dict[str, Any]


@dataclass
class Samples:
    """Of one row: one entry per repeat; the limits are measured right before it."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    tcp_s: list[float] = field(default_factory=list)
    memcpy_s: list[float] = field(default_factory=list)
    num_frames: int = 0


def describe(name: str, row: str, num_bytes: int, samples: Samples) -> Line:
    """One line of the report. A ratio is of the best times: what the machine can do, and what we
    can; `median_ms` says what it was like meanwhile."""
    best_s = min(samples.seconds)
    line: Line = {
        "size": num_bytes,
        "transport": name,
        "row": row,
        "repeats": len(samples.seconds),
        "best_ms": best_s * 1e3,
        "median_ms": median(samples.seconds) * 1e3,
        "tcp_mb_s": num_bytes / min(samples.tcp_s) / 1e6,
        "memcpy_mb_s": num_bytes / min(samples.memcpy_s) / 1e6,
    }
    if row != EMPTY:
        line |= {
            "mb_s": num_bytes / best_s / 1e6,
            "of_tcp": min(samples.tcp_s) / best_s,
            "of_memcpy": min(samples.memcpy_s) / best_s,
            "frames_s": samples.num_frames / best_s,
            "cpu_s_gib": min(samples.cpu_s) / (num_bytes / (1 << 30)),
        }
    return line


def show(lines: list[Line]) -> None:
    """The lines of one size."""
    print(f"\n{_size(lines[0]):23}" + "".join(f"{head:>{width}}" for _, head, width, _ in _COLUMNS))
    for line in lines:
        cells = (
            f"{line[key]:{width}.{digits}f}" for key, _, width, digits in _COLUMNS if key in line
        )
        print(f"  {line['transport']:6}{line['row']:15}" + "".join(cells), flush=True)


def show_markdown(report: list[Line]) -> None:
    heads = ["size", "transport", "row", *(head for _, head, _, _ in _COLUMNS)]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    last = ""
    for line in report:
        size = "" if _size(line) == last else _size(line)
        last = _size(line)
        cells = [f"{line[key]:.{n}f}" if key in line else "" for key, _, _, n in _COLUMNS]
        print("| " + " | ".join([size, line["transport"], line["row"], *cells]) + " |")
    for key, what in (("tcp_mb_s", "Bare TCP"), ("memcpy_mb_s", "memcpy")):
        by_size: dict[str, float] = {}
        for line in report:
            by_size[_size(line)] = max(by_size.get(_size(line), 0.0), line[key])
        print(f"\n{what}, MB/s: " + ", ".join(f"{s} {rate:.0f}" for s, rate in by_size.items()))


def show_targets(report: list[Line]) -> None:
    print()
    for name, row, key, target in _TARGETS:
        found = {
            _size(line): line[key]
            for line in report
            if (line["transport"], line["row"]) == (name, row) and line["size"] >= _FROM_BYTES
        }
        if found:
            verdict = "holds" if min(found.values()) >= target else "MISSED"
            ratios = ", ".join(f"{size} {ratio:.2f}" for size, ratio in found.items())
            print(f"- {name} {row} >= {target} of {_LIMITS[key]}: {verdict} ({ratios})")
    _show_beside_copies(report)
    for empty in (line for line in report if line["row"] == EMPTY):
        where = (empty["size"], empty["transport"])
        for line in report:
            if (line["size"], line["transport"]) == where and line["row"] == POOL:
                calls = line["best_ms"] / empty["best_ms"]
                verdict = "holds" if calls <= _MAX_CALLS else "MISSED"
                print(
                    f"- one block over {where[1]} <= {_MAX_CALLS:.0f} empty calls: {verdict} "
                    f"({calls:.1f})"
                )


def _show_beside_copies(report: list[Line]) -> None:
    """How near each transport is to what the copies allow on this machine."""
    copies = {line["size"]: line for line in report if line["row"] == COPIES}
    sizes = [size for size in copies if size >= _FROM_BYTES]
    if not sizes:
        return
    limits = ", ".join(f"{_size(copies[s])} {copies[s]['of_memcpy']:.2f}" for s in sizes)
    print(f"- copies alone, of memcpy: {limits}")
    for name in dict.fromkeys(line["transport"] for line in report if line["row"] == POOL):
        of_copies = ", ".join(
            f"{_size(line)} {copies[line['size']]['best_ms'] / line['best_ms']:.2f}"
            for line in report
            if (line["transport"], line["row"]) == (name, POOL) and line["size"] in sizes
        )
        print(f"- {name} pool to pool, of copies alone: {of_copies}")


def _size(line: Line) -> str:
    num_bytes = line["size"]
    return f"{num_bytes / MIB:.3g} MiB" if num_bytes >= MIB else f"{num_bytes >> 10} KiB"
