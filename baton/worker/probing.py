"""Before a worker is ready: warm the links to a few peers, and see how fast they are. Workers that
start together see nobody then: they look again soon after."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from baton.errors import BatonError
from baton.kvtransfer.base import Transport
from baton.kvtransfer.probe import probe
from baton.types import TransferStats, TransportAddress, WorkerInfo
from baton.worker.link_table import LinkClass, LinkTable, to_probe

log = logging.getLogger(__name__)

_PROBES_BYTES = 1 << 20, 4 << 20, 4 << 20
_PROBE_S = 1.0  # for each of them
_ALL_S = 3.0  # a worker is ready after this, whatever its links are like
LOOKS_S = (1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # the first peers come soon or with traffic


async def probe_links(
    peers: Iterable[WorkerInfo],
    own: WorkerInfo,
    transports: Sequence[Transport],
    links: LinkTable,
) -> None:
    """One probe at a time; a peer that does not answer in time is passed over."""
    by_name = {transport.name: transport for transport in transports}
    peers = list(peers)
    reachable = [
        address
        for peer in peers
        for address in peer.transports
        if address.name in by_name and by_name[address.name].reaches(address)
    ]
    silent: set[str] = set()
    try:
        async with asyncio.timeout(_ALL_S):
            for peer, address, is_same_host in to_probe(peers, own, reachable):
                if peer.worker_id in silent:
                    continue
                stats = await _probed(by_name[address.name], peer, address, own)
                if stats is None:
                    silent.add(peer.worker_id)
                    continue
                link = links.open(address, is_same_host, time.monotonic())
                warning = links.probed(link, stats)
                if warning is not None:
                    log.warning("the link to %s is slow: %s", peer.worker_id, warning)
    except TimeoutError:
        log.warning("some links were not probed within %.0f s", _ALL_S)
    for rate in links.rates():
        where = LinkClass(rate.transport, rate.is_same_host)
        log.info("links over %s: %.1f MB/s", where, rate.bytes_per_s / 1e6)


async def probe_first_peers(
    peers: Callable[[], Awaitable[Iterable[WorkerInfo]]],
    own: WorkerInfo,
    transports: Sequence[Transport],
    links: LinkTable,
) -> None:
    """As `probe_links`, once, when there is the first peer to probe and while nothing is known of
    any link. A minute later it is up to what comes over them.

    Args:
        peers: who is registered now.
    """
    for pause_s in LOOKS_S:
        await asyncio.sleep(pause_s)
        if links.rates():
            return
        await probe_links(await peers(), own, transports, links)


async def _probed(
    transport: Transport, peer: WorkerInfo, address: TransportAddress, own: WorkerInfo
) -> TransferStats | None:
    """The best of what probes show; None if nothing came. The first one warms up the link."""
    seen: list[TransferStats] = []
    try:
        for num_bytes in _PROBES_BYTES:
            stats = await probe(transport, address, own.layout, own.worker_id, num_bytes, _PROBE_S)
            seen.append(stats)
            if stats.num_bytes < num_bytes:
                break  # so slow that this is enough to know
    except (BatonError, TimeoutError) as error:
        reason = str(error) or f"nothing within {_PROBE_S:.0f} s"
        log.info("no probe of %s over %s: %s", peer.worker_id, address.name, reason)
    return max(seen, key=lambda stats: stats.num_bytes / stats.duration_ms, default=None)
