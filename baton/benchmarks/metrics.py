"""From outcomes to figures; the names in the result are vLLM's."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from baton.benchmarks.measure import Outcome

METRICS = ("ttft", "tpot", "itl", "e2el")


def latencies_ms(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Of the requests that were served: per metric, in milliseconds."""
    served = [outcome for outcome in outcomes if outcome.ok]
    return {
        "ttft": [1e3 * outcome.ttft for outcome in served],
        "tpot": [1e3 * tpot for outcome in served if (tpot := outcome.tpot) is not None],
        "itl": [1e3 * gap for outcome in served for gap in outcome.itl],
        "e2el": [1e3 * outcome.latency for outcome in served],
    }


def summarize(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    percentile_metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """
    Args:
        duration: seconds from the first request to the last answer.
        goodput: metric → the most milliseconds that a good request takes; empty = not asked for.
    """
    served = [outcome for outcome in outcomes if outcome.ok]
    num_input = sum(outcome.input_len for outcome in served)
    num_output = sum(outcome.output_len for outcome in served)
    good = sum(_is_good(outcome, goodput) for outcome in served) if goodput else None
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(served),
        "failed": len(outcomes) - len(served),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(served) / duration,
        "request_goodput": None if good is None else good / duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": max(tokens_per_second(served), default=0.0),
        "max_concurrent_requests": most_at_once(served),
        "failures": dict(Counter(outcome.kind for outcome in outcomes if not outcome.ok)),
    }
    for name, values in latencies_ms(outcomes).items():
        if name in percentile_metrics:
            figures.update(_described(name, values, percentiles))
    return figures


def detailed(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A list entry for each request, in the order they were sent; seconds."""
    return {
        "input_lens": [outcome.input_len for outcome in outcomes],
        "output_lens": [outcome.output_len for outcome in outcomes],
        "start_times": [outcome.start for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.itl for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def _described(name: str, values: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    array = np.array(values or [0.0])
    figures = {
        f"mean_{name}_ms": float(array.mean()),
        f"median_{name}_ms": float(np.median(array)),
        f"std_{name}_ms": float(array.std()),
    }
    for percentile in percentiles:
        word = f"{percentile:g}"
        figures[f"p{word}_{name}_ms"] = float(np.percentile(array, percentile))
    return figures


def _is_good(outcome: Outcome, goodput: Mapping[str, float]) -> bool:
    """One token has no time between tokens, so `tpot` is met."""
    values = {"ttft": outcome.ttft, "tpot": outcome.tpot or 0.0, "e2el": outcome.latency}
    return all(1e3 * values[name] <= limit for name, limit in goodput.items())


def tokens_per_second(served: Sequence[Outcome]) -> list[float]:
    """Output tokens of each second of the run. Chunks of a request have equal shares of its
    tokens."""
    if not served:
        return []
    began = min(outcome.start for outcome in served)
    seconds: defaultdict[int, float] = defaultdict(float)
    for outcome in served:
        share = outcome.output_len / (len(outcome.itl) + 1)
        at = outcome.start + outcome.ttft - began
        for gap in (0.0, *outcome.itl):
            at += gap
            seconds[int(at)] += share
    return [seconds[second] for second in range(max(seconds) + 1)]


def most_at_once(served: Sequence[Outcome]) -> int:
    """Requests that were under way together."""
    changes = [(outcome.start, 1) for outcome in served]
    changes += [(outcome.start + outcome.latency, -1) for outcome in served]
    most = count = 0
    for _, change in sorted(changes):
        count += change
        most = max(most, count)
    return most
