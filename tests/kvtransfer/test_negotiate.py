"""Which transport a fetch takes."""

import sys

import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.negotiate import choose, make_transports
from baton.rpc import ClusterToken, RpcServer
from baton.types import TransportAddress

UCX = TransportAddress("ucx", "10.0.0.5:9000")
GRPC = TransportAddress("grpc", "10.0.0.5:9000")
LOOPBACK = TransportAddress("ucx", "127.0.0.1:9000")


@pytest.mark.parametrize(
    ("own", "offered", "is_same_host", "avoid", "expected"),
    [
        (("ucx", "grpc"), (UCX, GRPC), False, (), UCX),
        (("ucx", "grpc"), (GRPC, UCX), False, (), UCX),  # the consumer's preference counts
        (("grpc", "ucx"), (UCX, GRPC), False, (), GRPC),
        (("grpc",), (UCX, GRPC), False, (), GRPC),
        (("ucx", "grpc"), (GRPC,), False, (), GRPC),
        (("ucx", "grpc"), (UCX, GRPC), False, (UCX,), GRPC),
        (("ucx", "grpc"), (UCX,), False, (UCX,), UCX),  # better than nothing
        (("ucx", "grpc"), (UCX, GRPC), False, (UCX, GRPC), UCX),
        (("ucx", "grpc"), (LOOPBACK, GRPC), True, (), LOOPBACK),
        (("ucx", "grpc"), (LOOPBACK, GRPC), False, (), GRPC),  # its loopback is hardly ours
        (("ucx", "grpc"), (LOOPBACK, GRPC), False, (GRPC,), GRPC),
        (("ucx",), (LOOPBACK,), False, (), LOOPBACK),
    ],
)
def test_choice(
    own: tuple[str, ...],
    offered: tuple[TransportAddress, ...],
    is_same_host: bool,
    avoid: tuple[TransportAddress, ...],
    expected: TransportAddress,
) -> None:
    assert choose(own, offered, is_same_host, avoid) == expected


@pytest.mark.parametrize(("own", "offered"), [(("ucx",), (GRPC,)), (("ucx",), ()), ((), (UCX,))])
def test_nothing_in_common(own: tuple[str, ...], offered: tuple[TransportAddress, ...]) -> None:
    with pytest.raises(BatonError, match="no common transport") as caught:
        choose(own, offered, is_same_host=False)
    assert caught.value.cause is Cause.UNSUPPORTED


@pytest.fixture
async def calls() -> FetchCalls:
    return FetchCalls(RpcServer(ClusterToken()).grpc, ClusterToken())


async def test_without_the_extra_there_is_grpc(
    calls: FetchCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "baton.kvtransfer.ucx", None)
    (transport,) = make_transports(("ucx", "grpc"), calls, "127.0.0.1:1")
    assert transport.name == "grpc"
    with pytest.raises(ValueError, match="none of the transports ucx can be used"):
        make_transports(("ucx",), calls, "127.0.0.1:1")


async def test_unknown_names_are_refused(calls: FetchCalls) -> None:
    with pytest.raises(ValueError, match="unknown transport 'pigeon'"):
        make_transports(("grpc", "pigeon"), calls, "127.0.0.1:1")
