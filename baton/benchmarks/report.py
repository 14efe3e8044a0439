"""What a person reads of a benchmark, and the file that programs read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_WIDTH = 52
_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
# A client that is busier, or later, than this measures itself.
_BUSY = 0.85
_LATE_MS = 20.0


def table(result: Mapping[str, Any]) -> str:
    return "\n".join(_lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield " Serving Benchmark Result ".center(_WIDTH, "=")
    yield _line("Successful requests:", result["completed"])
    yield _line("Failed requests:", result["failed"])
    for kind, count in sorted(result["failures"].items(), key=lambda pair: -pair[1]):
        yield _line(f"  {kind}:", count)
    for name, title in (
        ("max_concurrency", "Maximum request concurrency:"),
        ("request_rate", "Request rate configured (RPS):"),
    ):
        if result[name] not in (None, "inf"):
            yield _line(title, result[name])
    yield _line("Benchmark duration (s):", result["duration"])
    yield _line("Total input tokens:", result["total_input_tokens"])
    yield _line("Total generated tokens:", result["total_output_tokens"])
    yield _line("Request throughput (req/s):", result["request_throughput"])
    if result["request_goodput"] is not None:
        yield _line("Request goodput (req/s):", result["request_goodput"])
    yield _line("Output token throughput (tok/s):", result["output_throughput"])
    yield _line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    yield _line("Peak concurrent requests:", result["max_concurrent_requests"])
    yield _line("Total token throughput (tok/s):", result["total_token_throughput"])
    for name, title in _TITLES.items():
        if f"mean_{name}_ms" in result:
            yield title.center(_WIDTH, "-")
            yield from _metric(name, result)
    yield "Client".center(_WIDTH, "-")
    yield _line("CPU of one core (%):", 100 * result["client_cpu_share"])
    yield _line("Latest send (ms):", result["max_send_lag_ms"])
    yield "=" * _WIDTH


def _metric(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    short = name.upper()
    yield _line(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
    yield _line(f"Median {short} (ms):", result[f"median_{name}_ms"])
    for key, value in result.items():
        if key.startswith("p") and key.endswith(f"_{name}_ms"):
            word = key.removeprefix("p").removesuffix(f"_{name}_ms")
            yield _line(f"P{word} {short} (ms):", value)


def _line(title: str, value: float | str) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{title:<40} {shown:>{_WIDTH - 41}}"


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Why the figures may be the client's."""
    found = []
    if result["client_cpu_share"] > _BUSY:
        found.append("the client was busy most of the time: it may have measured itself")
    if result["max_send_lag_ms"] > _LATE_MS:
        found.append(f"a request was sent {result['max_send_lag_ms']:.0f} ms late")
    return found


def result_path(result: Mapping[str, Any], directory: Path | None, filename: str | None) -> Path:
    """As vLLM names it, unless `filename` is given."""
    if filename is None:
        concurrency = result["max_concurrency"]
        model = str(result["model_id"]).rpartition("/")[2]
        filename = (
            f"{result['label'] or result['endpoint_type']}-{result['request_rate']}qps"
            f"{'' if concurrency is None else f'-concurrency{concurrency}'}"
            f"-{model}-{result['date']}.json"
        )
    return (directory or Path()) / filename


def save(result: Mapping[str, Any], path: Path, *, append: bool = False) -> None:
    """
    Raises:
        OSError
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        if append and file.tell() > 0:
            file.write("\n")
        json.dump(result, file)
