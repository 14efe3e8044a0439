"""What is known of the links to other workers: pure, fed by probes and by every fetch.

A *class* is a transport within one host or between hosts. A link that nothing has come over yet is
taken to be as fast as its class; a class of which nothing is known, as a careful guess.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from baton.kvtransfer.importer import INITIAL_RATE_BYTES_S
from baton.latency import LinkModel
from baton.types import LinkRate, TransferStats, TransportAddress, WorkerInfo

MAX_PROBES = 4  # per class, before a worker is ready
_FAR_BELOW, _BACK = 4.0, 2.0  # times slower than its class: worth a warning, and over again
_MIN_MEASURED = 2  # fetches, before that is said


@dataclass(frozen=True, slots=True)
class LinkClass:
    transport: str
    is_same_host: bool

    def __str__(self) -> str:
        return f"{self.transport} {'within this host' if self.is_same_host else 'between hosts'}"


@dataclass(slots=True)
class Link:
    """To one producer over one transport. Its `model` is fed through `LinkTable` alone."""

    where: LinkClass
    model: LinkModel
    used_at_s: float
    probed: float = 0.0  # bytes per ms
    avoid_until_s: float = 0.0  # a transport that failed is the last choice until then
    is_chosen: bool = False  # by a fetch, rather than by a probe alone
    is_warned_of: bool = False


class LinkTable:
    """The links of one worker, as the consumer."""

    def __init__(self) -> None:
        self._links: dict[TransportAddress, Link] = {}

    def __len__(self) -> int:
        return len(self._links)

    def get(self, address: TransportAddress) -> Link | None:
        return self._links.get(address)

    def open(self, address: TransportAddress, is_same_host: bool, now_s: float) -> Link:
        """The link to this address, used now; a new one begins at the rate of its class."""
        link = self._links.get(address)
        if link is None:
            where = LinkClass(address.name, is_same_host)
            rate = self._class_rate(where) or INITIAL_RATE_BYTES_S / 1e3
            link = self._links[address] = Link(where, LinkModel(bytes_per_ms=rate), now_s)
        link.used_at_s = now_s
        return link

    def to_avoid(self, now_s: float) -> set[TransportAddress]:
        """Those whose transport failed a moment ago."""
        return {where for where, link in self._links.items() if link.avoid_until_s > now_s}

    def forget(self, unused_since_s: float) -> None:
        """Producers come and go."""
        for where, link in list(self._links.items()):
            if link.used_at_s < unused_since_s:
                del self._links[where]

    def probed(self, link: Link, stats: TransferStats) -> str | None:
        """What a probe showed, which packs nothing: good as a guess until KV comes. Returns a
        warning as `learn`."""
        link.probed = stats.num_bytes / max(stats.duration_ms, 1e-3)
        if not link.model.num_measured:
            link.model.bytes_per_ms = link.probed
        others = self._of(link.where, link)
        return _warning(link, link.probed, [other.probed for other in others if other.probed])

    def learn(self, link: Link, stats: TransferStats) -> str | None:
        """From a fetch. Returns a warning when this link turns out to be far slower than the others
        of its class; another one only after it has been about as fast as they."""
        link.model.learn(stats)
        return self._compared(link)

    def stalled(self, link: Link) -> str | None:
        """A fetch was given up because too little came in time; as `learn`."""
        link.model.stalled()
        return self._compared(link)

    def _compared(self, link: Link) -> str | None:
        if link.model.num_measured < _MIN_MEASURED:
            return None
        others = _measured(self._of(link.where, link), _MIN_MEASURED)
        return _warning(link, link.model.bytes_per_ms, others)

    def rates(self) -> tuple[LinkRate, ...]:
        """Of every class of which something is known."""
        classes = dict.fromkeys(link.where for link in self._links.values())
        return tuple(
            LinkRate(where.transport, where.is_same_host, rate * 1e3)
            for where in classes
            if (rate := self._class_rate(where)) is not None
        )

    def _class_rate(self, where: LinkClass) -> float | None:
        """Bytes per ms. A worker that is busy sends slowly, so the upper half counts."""
        links = self._of(where)
        rates = sorted(_measured(links, 1) or [link.probed for link in links if link.probed])
        return median(rates[len(rates) // 2 :]) if rates else None

    def _of(self, where: LinkClass, without: Link | None = None) -> list[Link]:
        links = self._links.values()
        return [link for link in links if link.where == where and link is not without]


def _measured(links: Iterable[Link], min_times: int) -> list[float]:
    """The rates that were measured so many times."""
    models = [link.model for link in links]
    return [model.bytes_per_ms for model in models if model.num_measured >= min_times]


def _warning(link: Link, rate: float, others: list[float]) -> str | None:
    if not others:
        return None
    usual = median(others)
    was_warned_of = link.is_warned_of
    link.is_warned_of = rate * (_BACK if was_warned_of else _FAR_BELOW) < usual
    if was_warned_of or not link.is_warned_of:
        return None
    return f"{rate / 1e3:.1f} MB/s over {link.where}, where {usual / 1e3:.1f} MB/s are usual"


def to_probe(
    peers: Iterable[WorkerInfo], own: WorkerInfo, reachable: Iterable[TransportAddress]
) -> list[tuple[WorkerInfo, TransportAddress, bool]]:
    """Whom to probe, and over what: (peer, its address, is it on this host?), at most MAX_PROBES
    per class; other workers choose other peers.

    Args:
        reachable: addresses that this worker can use.
    """
    usable, chosen = set(reachable), []
    counts: dict[LinkClass, int] = {}
    others = [peer for peer in peers if peer.incarnation != own.incarnation]
    for peer in sorted(others, key=lambda peer: _distance(peer.incarnation, own.incarnation)):
        is_same_host = peer.host_id == own.host_id
        for address in peer.transports:
            where = LinkClass(address.name, is_same_host)
            if address in usable and counts.get(where, 0) < MAX_PROBES:
                counts[where] = counts.get(where, 0) + 1
                chosen.append((peer, address, is_same_host))
    return chosen


def _distance(one: bytes, other: bytes) -> int:
    """Of two random ids: an order of peers that is different for everybody."""
    return int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
