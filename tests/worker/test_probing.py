"""Probing before a worker is ready: one at a time, few bytes, and never for long."""

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import FetchOpen, FrameSink, FrameSource, Probe
from baton.types import TransferStats, TransportAddress, WorkerInfo
from baton.worker import probing
from baton.worker.link_table import LinkTable
from baton.worker.probing import LOOKS_S, probe_first_peers, probe_links
from tests.worker.test_link_table import address, peer

FRAME_S = 0.02


class Probed:
    """A transport of which each address has a speed in MB/s, none at all, or an error."""

    name = "ucx"

    def __init__(self, speeds: dict[str, float | BatonError | None]) -> None:
        self._speeds = speeds
        self.asked: list[str] = []
        self.num_bytes = 0
        self._num_running = 0

    async def start(self, source: FrameSource) -> TransportAddress:
        raise NotImplementedError

    def reaches(self, peer: TransportAddress) -> bool:
        return True

    async def fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        assert isinstance(fetch.source, Probe)
        assert self._num_running == 0, "one probe at a time"
        self._num_running += 1
        try:
            self.asked.append(peer.address)
            speed = self._speeds[peer.address]
            if isinstance(speed, BatonError):
                raise speed
            sink.opened(0, 0)
            num_left = fetch.source.num_bytes
            while speed is not None:
                num_bytes = min(int(speed * 1e6 * FRAME_S), num_left)
                num_left -= num_bytes
                await asyncio.sleep(num_bytes / speed / 1e6)
                self.num_bytes += num_bytes
                if await sink.frame(bytes(num_bytes)):
                    return TransferStats(self.name, fetch.source.num_bytes)
            await asyncio.Event().wait()
            raise AssertionError
        finally:
            self._num_running -= 1

    async def close(self) -> None: ...


OWN = replace(peer(99, "there", ()), incarnation=b"\0" * 16)


async def probed(speeds: list[Any]) -> tuple[Probed, LinkTable]:
    """Of peers 0, 1, 2, …, which are probed in this order."""
    peers: list[WorkerInfo] = []
    for number in range(len(speeds)):
        made = peer(number, "here", (address(number),))
        peers.append(replace(made, incarnation=(number + 1).to_bytes(16, "big")))
    transport = Probed({address(n).address: speed for n, speed in enumerate(speeds)})
    links = LinkTable()
    await probe_links(peers, OWN, [transport], links)
    return transport, links


async def test_few_peers_and_few_bytes() -> None:
    transport, links = await probed([60.0] * 30)
    assert len(set(transport.asked)) == 4
    assert transport.num_bytes <= 4 * (9 << 20)
    (rate,) = links.rates()
    assert 5e6 < rate.bytes_per_s <= 60e6


async def test_peers_that_refuse_are_passed_over() -> None:
    gone = BatonError(Cause.TRANSPORT_FAILED, "nobody there")
    transport, links = await probed([gone, 50.0, gone, 70.0])
    assert len(set(transport.asked)) == 4
    assert len(links) == 2


async def test_silent_peers_delay_readiness_by_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(probing, "_PROBE_S", 0.05)
    monkeypatch.setattr(probing, "_ALL_S", 0.12)
    caplog.set_level(logging.INFO)
    started_s = time.monotonic()
    transport, links = await probed([None] * 30)
    assert time.monotonic() - started_s < 10.0
    assert 1 <= len(transport.asked) <= 3
    assert links.rates() == ()
    assert "some links were not probed" in caplog.text
    assert "nothing within" in caplog.text


async def test_a_slow_link_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that is too slow for all of the probe."""
    monkeypatch.setattr(probing, "_PROBE_S", 0.3)
    caplog.set_level(logging.INFO)
    _, links = await probed([1000.0, 900.0, 1.0])
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "the link to w2 is slow: " in warning.getMessage()
    assert "MB/s over ucx between hosts" in warning.getMessage()
    link = links.get(address(2))
    assert link is not None
    assert 0.1e3 < link.probed < 1.5e3
    assert "links over ucx between hosts: " in caplog.text


async def looked(
    looks: list[list[WorkerInfo]], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, LinkTable]:
    """What each look at the registrations shows; how often was looked?"""
    monkeypatch.setattr(probing, "LOOKS_S", (0.0,) * len(LOOKS_S))
    num_looks = 0

    async def peers() -> list[WorkerInfo]:
        nonlocal num_looks
        num_looks += 1
        return looks[min(num_looks, len(looks)) - 1]

    links = LinkTable()
    await probe_first_peers(peers, OWN, [Probed({address(0).address: 5000.0})], links)
    return num_looks, links


async def test_the_first_peer_is_probed_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = replace(peer(0, "here", (address(0),)), incarnation=b"\1" * 16)
    num_looks, links = await looked([[OWN], [OWN], [OWN, first]], monkeypatch)
    assert num_looks == 3
    (rate,) = links.rates()
    assert rate.transport == "ucx"


async def test_nobody_is_looked_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    num_looks, links = await looked([[OWN]], monkeypatch)
    assert num_looks == len(LOOKS_S)
    assert links.rates() == ()
