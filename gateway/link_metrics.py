"""Prometheus series of each link: a pair of workers between which KV moves.

The fleet keeps the totals; they are read when they are scraped. A worker that is forgotten takes
its links' series along, so there are never more of them than pairs of workers that are known.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from baton.gateway.backend import LinkView

_PAIR = ("source", "target")


class LinkMetrics(Collector):
    """Register it with the gateway's registry."""

    def __init__(self, read: Callable[[], Sequence[LinkView]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        return _families(self._read())

    def describe(self) -> Iterator[Metric]:
        return _families(())


def _families(links: Iterable[LinkView]) -> Iterator[Metric]:
    by_transport, by_cause = (*_PAIR, "transport"), (*_PAIR, "cause")
    transfers = CounterMetricFamily(
        "baton_kv_link_transfers", "Fetches that ended well.", labels=by_transport
    )
    num_bytes = CounterMetricFamily("baton_kv_link_bytes", "KV they moved.", labels=by_transport)
    seconds = CounterMetricFamily(
        "baton_kv_link_seconds", "Time they took, waiting for the prefill included.",
        labels=by_transport,
    )  # fmt: skip
    failures = CounterMetricFamily(
        "baton_kv_link_failures", "Fetches that ended early.", labels=by_cause
    )
    rate = GaugeMetricFamily(
        "baton_kv_link_rate_bytes_per_second",
        "Measured rate, smoothed, or that of links like it.",
        labels=_PAIR,
    )
    in_flight = GaugeMetricFamily(
        "baton_kv_link_in_flight_bytes", "KV expected of fetches under way.", labels=_PAIR
    )
    for link in links:
        pair = (link.source, link.target)
        for transport, moved in link.moved.items():
            transfers.add_metric((*pair, transport), moved.num_transfers)
            num_bytes.add_metric((*pair, transport), moved.num_bytes)
            seconds.add_metric((*pair, transport), moved.seconds)
        for cause, count in link.failures.items():
            failures.add_metric((*pair, cause.name.lower()), count)
        if link.bytes_per_s is not None:
            rate.add_metric(pair, link.bytes_per_s)
        in_flight.add_metric(pair, link.in_flight_bytes)
    yield from (transfers, num_bytes, seconds, failures, rate, in_flight)
