"""What a benchmark's requests looked like, as a picture. Needs matplotlib: the extra `plot`."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.benchmarks.measure import Outcome
from baton.benchmarks.metrics import latencies_ms, tokens_per_second

SUFFIXES = (".png", ".svg", ".pdf")


def is_available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def save(result: Mapping[str, Any], outcomes: Sequence[Outcome], path: Path) -> None:
    """Four panels: distributions of TTFT and TPOT, of ITL, requests over time, tokens a second.

    Raises:
        OSError
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (first, second), (third, fourth) = figure.subplots(2, 2)
    values = latencies_ms(outcomes)
    _distribution(first, {name.upper(): values[name] for name in ("ttft", "tpot")})
    _distribution(second, {"ITL": values["itl"]})
    _requests(third, outcomes)
    rates = tokens_per_second([outcome for outcome in outcomes if outcome.ok])
    fourth.step(range(len(rates)), rates, where="post")
    fourth.set(xlabel="seconds", ylabel="output tokens / s", ylim=(0, None))
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{result['model_id']}, {result['completed']} requests, {result['failed']} failed, "
        f"{result['output_throughput']:.0f} output tok/s"
    )
    figure.savefig(path, dpi=120)


def _distribution(axes: Any, series: Mapping[str, Sequence[float]]) -> None:
    for name, values in series.items():
        if values:
            shares = [(i + 1) / len(values) for i in range(len(values))]
            axes.step(sorted(values), shares, where="post", label=name)
    axes.set(xlabel="ms", ylabel="share of all", ylim=(0, 1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _requests(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """A line each, from sending to the end; the first token parts it."""
    began = min(outcome.start for outcome in outcomes)
    for number, outcome in enumerate(sorted(outcomes, key=lambda one: one.start)):
        at = outcome.start - began
        if outcome.ok:
            axes.hlines(number, at, at + outcome.ttft, colors="tab:orange", linewidth=1)
            axes.hlines(
                number, at + outcome.ttft, at + outcome.latency, colors="tab:blue", linewidth=1
            )
        else:
            axes.plot(at, number, "rx", markersize=4)
    axes.set(xlabel="seconds (orange: until the first token; ×: failed)", ylabel="request")
