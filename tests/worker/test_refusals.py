"""Who is not let at a prompt's KV, over the wire, at a worker that holds some: every wrong ticket,
every wrong claim, everybody without the cluster's token."""

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
import torch

from baton import wire
from baton.config import WorkerConfig
from baton.engine.config import EngineConfig
from baton.engine.core import EngineCore
from baton.engine.null_runner import NullModel, NullRunner
from baton.errors import BatonError, Cause
from baton.hashing import tokens_digest
from baton.kvtransfer.base import FetchOpen, Transport
from baton.kvtransfer.calls import FetchCalls
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.memory import KVMemory
from baton.kvtransfer.negotiate import make_transports
from baton.kvtransfer.ticket import TicketKeyring, salt_digest
from baton.messages import Admitted, StepBatch, Submit
from baton.rpc import ClusterToken, RpcServer, connect, to_baton_error
from baton.session_wire import open_session
from baton.types import (
    BlockId,
    KVGroup,
    KVKind,
    KVLayout,
    KVRange,
    KVTicket,
    LegId,
    Request,
    Role,
    SamplingParams,
    TransportAddress,
    WorkerInfo,
)
from baton.v1 import kv_pb2, kv_pb2_grpc
from baton.worker import main
from baton.worker.data_plane import make_data_plane
from baton.worker.policy import WorkerPolicy
from baton.worker.service import SERVICES, WorkerService
from baton.worker.worker import Worker
from tests.worker.fleet import GRANT_KEYS

TOKEN, OLD_TOKEN = ClusterToken(("new", "old")), ClusterToken(("old",))
STRANGERS = {"no token": ClusterToken(), "a wrong token": ClusterToken(("wrong",))}
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 1, 1, 4, "float32"),), block_size=16)
NUM_BLOCKS = 64
NUM_TOKENS = 40
REQUEST = Request("r", tuple(range(NUM_TOKENS)), SamplingParams(seed=1, max_tokens=8), salt=b"salt")
MODEL = NullModel()
UCX = [
    pytest.mark.ucx,
    pytest.mark.skipif(
        importlib.util.find_spec("ucxx") is None, reason="the ucx extra is not installed"
    ),
]
TRANSPORTS = ["grpc", "shm", pytest.param("ucx", marks=UCX)]


@dataclass
class Served:
    worker: Worker
    address: str
    transports: tuple[TransportAddress, ...]


def memory() -> KVMemory:
    return KVMemory(torch.zeros((1, 2, NUM_BLOCKS, 16, 1, 4)), LAYOUT)


@asynccontextmanager
async def serve(transports: tuple[str, ...], incarnation: bytes = b"i" * 16) -> Any:
    server = RpcServer(TOKEN)
    address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    plane = make_data_plane(memory(), transports, server.grpc, TOKEN, address, 1 << 20)
    config = EngineConfig(num_blocks=NUM_BLOCKS, max_num_batched_tokens=128)
    info = WorkerInfo(
        worker_id="p",
        incarnation=incarnation,
        role=Role.BOTH,
        model="null",
        fingerprint=b"f" * 32,
        layout=LAYOUT,
        address=address,
        transports=await plane.start(),
        host_id="h",
        pid=1,
        device="cpu",
        num_blocks=NUM_BLOCKS,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=MODEL.vocab_size,
        eos_token_ids=(),
    )
    core = EngineCore(config, NullRunner(NUM_BLOCKS, 16, MODEL))
    policy = WorkerPolicy(session_timeout_ms=10**9)
    worker = Worker(info, policy, core, plane, GRANT_KEYS)
    service = WorkerService(worker.runtime, lambda: (0, []), worker.score)
    service.add_to(server.grpc)
    worker.start()
    await server.start(SERVICES)
    try:
        yield Served(worker, address, info.transports)
    finally:
        await service.close()
        await worker.close()
        await server.stop(0)


@asynccontextmanager
async def consumer(name: str, token: ClusterToken) -> AsyncIterator[Transport]:
    server = RpcServer(TOKEN)
    address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    calls = FetchCalls(server.grpc, token)
    (transport,) = make_transports((name,), calls, address)
    try:
        yield transport
    finally:
        await transport.close()
        await calls.close()
        await server.stop(0)


@dataclass
class Scene:
    p: Served
    ticket: KVTicket
    d: Transport

    def fetch_open(self, **changes: Any) -> FetchOpen:
        fetch = FetchOpen(
            source=self.ticket,
            range=KVRange(0, 1, 0, NUM_TOKENS),
            layout=LAYOUT,
            fingerprint=b"f" * 32,
            tokens_digest=tokens_digest(REQUEST.prompt_token_ids),
            salt_digest=salt_digest(REQUEST.salt),
            consumer="d",
        )
        return replace(fetch, **changes)

    async def fetch(self, fetch: FetchOpen, transport: Transport | None = None) -> int:
        pool = memory()
        importer = Importer(pool, [BlockId(i) for i in range(3)], fetch.range)
        transport = transport or self.d
        (peer,) = (where for where in self.p.transports if where.name == transport.name)
        try:
            return (await transport.fetch(peer, fetch, importer)).num_bytes
        finally:
            pool.close()


@pytest.fixture(params=TRANSPORTS)
async def scene(request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    """A worker with a lease on REQUEST's KV, and a consumer."""
    async with AsyncExitStack() as stack:
        p = await stack.enter_async_context(serve((request.param,)))
        connection = connect(p.address, TOKEN)
        stack.push_async_callback(connection.close)
        call = open_session(connection)
        await call.write(wire.gateway_message_to_pb(Submit(LegId("r", 1), REQUEST)))
        ticket: KVTicket | None = None
        async with asyncio.timeout(20):
            while ticket is None:
                message = wire.worker_message_from_pb(await call.read())
                for item in message.messages if isinstance(message, StepBatch) else ():
                    ticket = item.ticket if isinstance(item, Admitted) else ticket
        d = await stack.enter_async_context(consumer(request.param, TOKEN))
        yield Scene(p, ticket, d)
        call.cancel()
        async with asyncio.timeout(20):
            while not p.worker.is_idle:
                await asyncio.sleep(0.01)
        pool = p.worker.core.pool
        assert (pool.num_free, pool.num_quarantined) == (NUM_BLOCKS, 0)


FORGED = TicketKeyring(b"x" * 32).mint
WRONG_TICKETS: dict[str, tuple[Any, Cause]] = {
    "signed by nobody": (lambda t: replace(t, mac=bytes(32)), Cause.TICKET_FORGED),
    "signed by another": (FORGED, Cause.TICKET_FORGED),
    "of an unknown key": (lambda t: replace(t, key_id=t.key_id + 7), Cause.TICKET_FORGED),
    "with more time": (lambda t: replace(t, expires_at_ms=2**50), Cause.TICKET_FORGED),
    "of another transfer": (lambda t: replace(t, transfer_id=b"t" * 16), Cause.TICKET_FORGED),
    "of fewer tokens": (lambda t: replace(t, num_tokens=16), Cause.TICKET_FORGED),
    "for another address": (lambda t: replace(t, address="x:1"), Cause.TICKET_FORGED),
    "of an earlier process": (lambda t: replace(t, incarnation=b"o" * 16), Cause.LEASE_UNKNOWN),
}  # fmt: skip
OTHER_MODEL = KVLayout((KVGroup(KVKind.FULL, 1, 2, 4, "float32"),), block_size=16)
WRONG_CLAIMS: dict[str, tuple[dict[str, Any], Cause]] = {
    "another model": ({"fingerprint": b"o" * 32}, Cause.MODEL_MISMATCH),
    "another layout": ({"layout": OTHER_MODEL}, Cause.LAYOUT_INCOMPATIBLE),
    "another tenant": ({"salt_digest": salt_digest(b"other")}, Cause.TENANT_MISMATCH),
    "another prompt": ({"tokens_digest": tokens_digest([1] * NUM_TOKENS)}, Cause.TOKENS_MISMATCH),
    "tokens beyond": ({"range": KVRange(0, 1, 0, NUM_TOKENS + 1)}, Cause.PROTOCOL),
    "tokens before the end": ({"range": KVRange(0, 1, 0, 16)}, Cause.PROTOCOL),
    "layers beyond": ({"range": KVRange(0, 2, 0, NUM_TOKENS)}, Cause.PROTOCOL),
    "heads beyond": ({"range": KVRange(0, 1, 0, NUM_TOKENS, 1, 2)}, Cause.PROTOCOL),
    "no credit": ({"initial_credit": 0}, Cause.PROTOCOL),
    "too much credit": ({"initial_credit": 10_000}, Cause.PROTOCOL),
}


async def test_wrong_tickets_are_refused_and_the_right_one_is_not(scene: Scene) -> None:
    for name, (change, cause) in WRONG_TICKETS.items():
        with pytest.raises(BatonError) as caught:
            await scene.fetch(scene.fetch_open(source=change(scene.ticket)))
        assert caught.value.cause is cause, name
    assert await scene.fetch(scene.fetch_open()) > 0
    assert await scene.fetch(scene.fetch_open()) > 0, "a ticket may be presented again"


async def test_wrong_claims_are_refused(scene: Scene) -> None:
    for name, (change, cause) in WRONG_CLAIMS.items():
        with pytest.raises(BatonError) as caught:
            await scene.fetch(scene.fetch_open(**change))
        assert caught.value.cause is cause, name
    assert await scene.fetch(scene.fetch_open()) > 0


async def test_a_ticket_is_void_at_another_worker(scene: Scene) -> None:
    async with serve((scene.d.name,), incarnation=b"j" * 16) as other:
        elsewhere = replace(scene, p=other)
        with pytest.raises(BatonError) as caught:
            await elsewhere.fetch(scene.fetch_open())
        assert caught.value.cause is Cause.LEASE_UNKNOWN


async def test_an_expired_ticket_is_refused_however_well_it_is_signed(scene: Scene) -> None:
    keyring: TicketKeyring = scene.p.worker.runtime.machine.producer._keyring
    expired = keyring.mint(replace(scene.ticket, expires_at_ms=1))
    with pytest.raises(BatonError) as caught:
        await scene.fetch(scene.fetch_open(source=expired))
    assert caught.value.cause is Cause.TICKET_EXPIRED


async def test_tickets_of_two_keys_are_valid_and_of_a_third_are_not(scene: Scene) -> None:
    keyring: TicketKeyring = scene.p.worker.runtime.machine.producer._keyring
    keyring.rotate(b"2" * 32)
    assert await scene.fetch(scene.fetch_open()) > 0
    assert await scene.fetch(scene.fetch_open(source=keyring.mint(scene.ticket))) > 0
    keyring.rotate(b"3" * 32)
    with pytest.raises(BatonError) as caught:
        await scene.fetch(scene.fetch_open())
    assert caught.value.cause is Cause.TICKET_FORGED


@pytest.mark.parametrize("token", STRANGERS.values(), ids=list(STRANGERS))
async def test_nothing_without_the_clusters_token(scene: Scene, token: ClusterToken) -> None:
    """Not even the honest ticket helps; over UCX nothing is sent anywhere."""
    async with consumer(scene.d.name, token) as stranger:
        with pytest.raises(BatonError) as caught:
            await scene.fetch(scene.fetch_open(), stranger)
        assert caught.value.cause is Cause.UNAUTHENTICATED
    connection = connect(scene.p.address, token)
    call = open_session(connection)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert to_baton_error(refused.value).cause is Cause.UNAUTHENTICATED
    stub = kv_pb2_grpc.KVStub(connection.channel)  # type: ignore[no-untyped-call]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Inventory(kv_pb2.InventoryRequest(), metadata=connection.metadata).read()
    assert to_baton_error(refused.value).cause is Cause.UNAUTHENTICATED
    await connection.close()


async def test_both_tokens_are_valid_while_they_are_changed(scene: Scene) -> None:
    async with consumer(scene.d.name, OLD_TOKEN) as late:
        assert await scene.fetch(scene.fetch_open(), late) > 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_worker_that_others_can_reach_does_not_start_without_a_token(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = WorkerConfig(worker_host=host, redis_url="redis://127.0.0.1:1")
    assert main.run(config, WorkerPolicy()) == 2
    (record,) = caplog.records
    assert record.getMessage() == f"listening on {host} needs a cluster token (--cluster-token)"
