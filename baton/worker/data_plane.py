"""The KV exchange of a worker process: pool memory, transports, and the fetches both ways."""

from collections.abc import Sequence

import grpc

from baton.kvtransfer.base import Transport
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.memory import KVMemory
from baton.kvtransfer.negotiate import make_transports
from baton.kvtransfer.probe import ProbedSource
from baton.kvtransfer.staging import StagingBudget
from baton.rpc import ClusterToken
from baton.types import TransportAddress
from baton.worker.exports import ExportDesk


class DataPlane:
    """Owns what moves KV. `start` before the server serves, `close` after the last fetch."""

    def __init__(
        self,
        memory: KVMemory,
        transports: Sequence[Transport],
        calls: FetchCalls | None = None,
        staging: StagingBudget | None = None,
    ) -> None:
        """
        Args:
            calls: what the transports between processes share.
            staging: of what is served; as much again may be on its way to this worker.
        """
        self.memory = memory
        self.transports = transports
        self.exports = ExportDesk()
        self.staging = staging or StagingBudget()
        self._calls = calls

    async def start(self) -> tuple[TransportAddress, ...]:
        source = ProbedSource(Exporter(self.memory, self.exports))
        return tuple([await transport.start(source) for transport in self.transports])

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
    staging_bytes: int,
) -> DataPlane:
    """
    Args:
        names: of transports, in order of preference; those that this machine lacks are left out.
        address: host:port at which others reach `server`.
        staging_bytes: bound of KV on its way, in each direction.

    Raises:
        ValueError: a name is unknown, or none of them can be used.
    """
    staging = StagingBudget(staging_bytes)
    calls = FetchCalls(server, token, staging)
    return DataPlane(memory, make_transports(names, calls, address, memory.device), calls, staging)
