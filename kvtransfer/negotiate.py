"""Which transports this worker has, and which one a fetch takes."""

import logging
from collections.abc import Collection, Sequence

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import DeviceMemory, Transport
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.grpc_stream import GrpcTransport
from baton.kvtransfer.shm import ShmTransport
from baton.rpc import is_loopback
from baton.types import TransportAddress

logger = logging.getLogger(__name__)

NAMES = ("cuda", "shm", "ucx", "grpc")


def make_transports(
    names: Sequence[str], calls: FetchCalls, address: str, device: DeviceMemory | None = None
) -> tuple[Transport, ...]:
    """The transports in `names` that this machine can run, in that order; the others are logged.

    Args:
        device: of the KV pool, if it is not in host memory.
        address: host:port at which others reach the gRPC server behind `calls`.

    Raises:
        ValueError: a name is unknown, or none of them can be run.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown transport {unknown[0]!r}; there are {', '.join(NAMES)}")
    made = tuple(t for name in names if (t := _make(name, calls, address, device)) is not None)
    if not made:
        raise ValueError(f"none of the transports {', '.join(names) or '(none)'} can be used")
    logger.info("KV transports: %s", ", ".join(transport.name for transport in made))
    return made


def _make(
    name: str, calls: FetchCalls, address: str, device: DeviceMemory | None
) -> Transport | None:
    if name == "grpc":
        return GrpcTransport(calls, address)
    if name == "shm":
        return _make_shm(calls, address)
    if name == "ucx":
        return _make_ucx(calls, address)
    return None if device is None else _make_ucx(calls, address, device)


def _make_shm(calls: FetchCalls, address: str) -> Transport | None:
    try:
        return ShmTransport(calls, address)
    except OSError as error:
        logger.warning("no shared memory here: %s", error)
    return None


def _make_ucx(
    calls: FetchCalls, address: str, device: DeviceMemory | None = None
) -> Transport | None:
    try:
        from baton.kvtransfer.ucx import UcxTransport

        return UcxTransport(calls, address, device)
    except ImportError:
        logger.info("no UCX here: the ucx extra is not installed")
    except OSError as error:
        logger.warning("no UCX here: %s", error)
    return None


def choose(
    own: Sequence[str],
    offered: Sequence[TransportAddress],
    is_same_host: bool,
    avoid: Collection[TransportAddress] = (),
) -> TransportAddress:
    """The producer's address for a fetch: the first of `own` that it offers.

    Args:
        own: names of the consumer's transports, in its order of preference.
        offered: the producer's, from its registration.
        is_same_host: are the host ids equal? If not, a loopback address is a last resort: it is
            right only where hosts that share no memory share a network.
        avoid: addresses that failed a moment ago; taken if there is nothing better.

    Raises:
        BatonError: UNSUPPORTED; they have none in common.
    """

    def doubt(address: TransportAddress) -> tuple[bool, bool]:
        host = address.address.rpartition(":")[0]
        return not is_same_host and is_loopback(host), address in avoid

    common = [address for name in own for address in offered if address.name == name]
    if not common:
        raise BatonError(
            Cause.UNSUPPORTED,
            f"no common transport: the producer offers {_names(offered)}, "
            f"this worker has {', '.join(own) or 'none'}",
        )
    chosen = min(common, key=doubt)
    logger.debug("KV over %s from %s (offered: %s)", *_pair(chosen), _names(offered))
    return chosen


def _pair(address: TransportAddress) -> tuple[str, str]:
    return address.name, address.address


def _names(offered: Sequence[TransportAddress]) -> str:
    return ", ".join(f"{name} at {where}" for name, where in map(_pair, offered)) or "none"
