"""The KV exchange of a worker process: pool memory, transports, and the fetches both ways."""

import logging
from collections.abc import Sequence

import grpc

from baton.kvtransfer.base import Transport
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.grpc_stream import GrpcTransport
from baton.kvtransfer.memory import KVMemory
from baton.rpc import ClusterToken
from baton.types import TransportAddress
from baton.worker.exports import ExportDesk

log = logging.getLogger(__name__)


class DataPlane:
    """Owns what moves KV. `start` before the server serves, `close` after the last fetch."""

    def __init__(
        self,
        memory: KVMemory,
        transports: Sequence[Transport],
        calls: FetchCalls | None = None,
    ) -> None:
        """
        Args:
            calls: what the transports between processes share.
        """
        self.memory = memory
        self.transports = transports
        self.exports = ExportDesk()
        self._calls = calls

    async def start(self) -> tuple[TransportAddress, ...]:
        exporter = Exporter(self.memory, self.exports)
        return tuple([await transport.start(exporter) for transport in self.transports])

    async def close(self) -> None:
        for transport in self.transports:
            await transport.close()
        if self._calls is not None:
            await self._calls.close()
        self.memory.close()


def make_data_plane(
    memory: KVMemory,
    names: Sequence[str],
    server: grpc.aio.Server,
    token: ClusterToken,
    address: str,
) -> DataPlane:
    """
    Args:
        names: of transports, in order of preference; those that this machine lacks are left out.

    Raises:
        ValueError: a name is unknown, or none of them can be used.
    """
    calls = FetchCalls(server, token)
    transports = [made for name in names if (made := _make_transport(name, calls, address))]
    if not transports:
        raise ValueError(f"none of the transports {', '.join(names)} can be used")
    log.info("KV transports: %s", ", ".join(transport.name for transport in transports))
    return DataPlane(memory, transports, calls)


def _make_transport(name: str, calls: FetchCalls, address: str) -> Transport | None:
    if name == "grpc":
        return GrpcTransport(calls, address)
    if name == "ucx":
        try:
            from baton.kvtransfer.ucx import UcxTransport
        except ImportError:
            log.info("no UCX here: install baton[ucx] for it")
            return None
        return UcxTransport(calls, address)
    raise ValueError(f"unknown transport {name!r}; there are ucx and grpc")
