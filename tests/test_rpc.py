"""Channels and servers: the token, the mapping of causes, limits, health."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import BatonError, Cause
from baton.rpc import (
    MAX_MESSAGE_BYTES,
    ClusterToken,
    RpcServer,
    connect,
    is_loopback,
    status_of,
    to_baton_error,
)

NO_TOKEN = ClusterToken()


async def unary(request: bytes, _context: Any) -> bytes:
    if request.startswith(b"fail:"):
        raise BatonError(Cause(int(request[5:])), "as asked")
    if request == b"bug":
        raise KeyError("secret detail")
    return request


async def chat(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield await unary(request, None)


async def write_and_read(_requests: Any, context: Any) -> None:
    while (request := await context.read()) is not grpc.aio.EOF:
        await context.write(await unary(request, None))


HANDLERS = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Chat": grpc.stream_stream_rpc_method_handler(chat),
    "Stream": grpc.stream_stream_rpc_method_handler(write_and_read),
}


@pytest.fixture
async def start() -> AsyncIterator[Any]:
    servers: list[RpcServer] = []

    async def start_server(token: ClusterToken = NO_TOKEN) -> str:
        server = RpcServer(token)
        handler = grpc.method_handlers_generic_handler("test.Echo", HANDLERS)
        server.grpc.add_generic_rpc_handlers((handler,))
        port = server.bind("127.0.0.1", 0)
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start_server
    for server in servers:
        await server.stop(0)


async def call(address: str, method: str, request: bytes, token: ClusterToken = NO_TOKEN) -> bytes:
    connection = connect(address, token)
    channel, metadata = connection.channel, connection.metadata
    try:
        if method == "Unary":
            echo = channel.unary_unary(f"/test.Echo/{method}")
            return await echo(request, metadata=metadata, timeout=20)
        stream = channel.stream_stream(f"/test.Echo/{method}")(metadata=metadata, timeout=20)
        await stream.write(request)
        return await stream.read()
    except grpc.aio.AioRpcError as error:
        raise to_baton_error(error) from error
    finally:
        await connection.close()


def test_every_cause_has_a_status() -> None:
    assert all(status_of(cause) is not grpc.StatusCode.OK for cause in Cause)


@pytest.mark.parametrize("method", ["Unary", "Chat", "Stream"])
async def test_a_cause_arrives_as_it_was_raised(start: Any, method: str) -> None:
    address = await start()
    for cause in Cause:
        with pytest.raises(BatonError) as caught:
            await call(address, method, b"fail:%d" % cause)
        assert (caught.value.cause, caught.value.message) == (cause, "as asked")


async def test_an_unexpected_exception_is_internal_and_tells_nothing(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BatonError) as caught:
        await call(await start(), "Unary", b"bug")
    assert caught.value.cause is Cause.INTERNAL
    assert "secret" not in caught.value.message
    assert "secret" in caplog.text


@pytest.mark.parametrize("method", ["Unary", "Chat", "Stream"])
async def test_the_token_is_asked_of_every_call(start: Any, method: str) -> None:
    address = await start(ClusterToken(("new", "old")))
    for good in ("new", "old"):
        assert await call(address, method, b"hi", ClusterToken((good,))) == b"hi"
    for bad in (NO_TOKEN, ClusterToken(("older",)), ClusterToken(("ne",))):
        with pytest.raises(BatonError) as caught:
            await call(address, method, b"hi", bad)
        assert caught.value.cause is Cause.UNAUTHENTICATED


async def test_health_needs_no_token(start: Any) -> None:
    connection = connect(await start(ClusterToken(("s",))), NO_TOKEN)
    stub = health_pb2_grpc.HealthStub(connection.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await connection.close()


async def test_nobody_there_is_a_failed_transport() -> None:
    server = RpcServer(NO_TOKEN)
    port = server.bind("127.0.0.1", 0)
    await server.grpc.stop(None)
    with pytest.raises(BatonError) as caught:
        await call(f"127.0.0.1:{port}", "Unary", b"hi")
    assert caught.value.cause is Cause.TRANSPORT_FAILED


async def test_a_message_beyond_the_limit_is_refused(start: Any) -> None:
    address = await start()
    with pytest.raises(BatonError) as caught:
        await call(address, "Unary", bytes(MAX_MESSAGE_BYTES + 1))
    assert caught.value.cause is Cause.PROTOCOL
    assert await call(address, "Unary", b"still here") == b"still here"


async def test_others_get_in_only_with_a_token() -> None:
    with pytest.raises(ValueError, match="needs a cluster token"):
        RpcServer(NO_TOKEN).bind("0.0.0.0", 0)
    server = RpcServer(ClusterToken(("s",)))
    assert server.bind("0.0.0.0", 0) > 0


async def test_a_taken_port_is_an_error() -> None:
    first, second = RpcServer(NO_TOKEN), RpcServer(NO_TOKEN)
    port = first.bind("127.0.0.1", 0)
    await first.start()
    with pytest.raises(OSError, match="cannot listen"):
        second.bind("127.0.0.1", port)
    await first.stop(0)


async def test_stop_waits_for_running_calls(start: Any) -> None:
    server = RpcServer(NO_TOKEN)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(request: bytes, _context: Any) -> bytes:
        entered.set()
        await leave.wait()
        return request

    handlers = {"Unary": grpc.unary_unary_rpc_method_handler(slow)}
    server.grpc.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Echo", handlers),)
    )
    address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    await server.start()
    calling = asyncio.create_task(call(address, "Unary", b"hi"))
    await entered.wait()
    stopping = asyncio.create_task(server.stop(grace_s=30))
    leave.set()
    assert await calling == b"hi"
    await stopping


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("worker-1", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_token_does_not_show_its_secrets() -> None:
    assert "hunter2" not in repr(ClusterToken(("hunter2",)))
