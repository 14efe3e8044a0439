"""URLs of Redis, and one that is reached over TLS with a password."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from baton import redis_client
from baton.redis_client import FAILURES, check_url, connect, reason_of, time_limit
from baton.redis_server import redis_command


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://:secret@[::1]:6379/2",
        "rediss://user:secret@host:6380/0?ssl_ca_certs=/etc/ca.pem",
        "unix:///run/redis.sock",
        "unix://:secret@/run/redis.sock?db=1",
    ],
)
def test_urls_that_can_be_used(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("host:6379", "must specify one of the following schemes"),
        ("http://host", "must specify one of the following schemes"),
        ("redis://host:port", "Port could not be cast"),
        ("redis://host/name", "number of a database"),
        ("redis://host?no_such_option=1", "no_such_option"),
        ("redis://host?db=x", "Invalid value for 'db'"),
        ("unix://run/redis.sock", "the whole path of a socket"),
        ("unix://", "the whole path of a socket"),
    ],
)
def test_urls_that_can_not(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        check_url(url)
    assert "\n" not in str(error.value)


async def test_a_cancellation_is_not_lost(redis_server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes as a command has just been sent."""
    client = connect(redis_server.url)

    async def ask() -> None:
        while not is_over:
            with suppress(*FAILURES):
                async with time_limit():
                    await client.ping()

    drain = asyncio.StreamWriter.drain

    async def drain_and_cancel(writer: asyncio.StreamWriter) -> None:
        await drain(writer)
        monkeypatch.undo()
        asking.cancel()

    is_over = False
    asking = asyncio.create_task(ask())
    await asyncio.sleep(0.05)
    monkeypatch.setattr(asyncio.StreamWriter, "drain", drain_and_cancel)
    done, _ = await asyncio.wait([asking], timeout=5)
    is_over = True
    assert done
    await client.aclose()


async def test_a_call_gives_up(redis_server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "TIMEOUT_S", 0.2)
    client = connect(redis_server.url)
    await client.ping()
    redis_server.pause()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        async with time_limit():
            await client.ping()
    await client.aclose()


def certificate(folder: Path, name: str) -> Path:
    """One for localhost, signed by itself, with its key beside it."""
    found = folder / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext"]
    command += ["subjectAltName=DNS:localhost", "-out", str(found)]
    command += ["-keyout", str(found.with_suffix(".key"))]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return found


@asynccontextmanager
async def over_tls(folder: Path, password: str, pem: Path) -> AsyncIterator[int]:
    """A Redis with a password behind TLS, which the bundled one has not; gives the port."""
    command = [*redis_command(folder), "--requirepass", password]
    server = await asyncio.create_subprocess_exec(*command)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection(folder / "redis.sock")
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem, pem.with_suffix(".key"))
    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        async with asyncio.timeout(20):
            while await ping(f"unix://:{password}@{folder}/redis.sock") != "served":
                await asyncio.sleep(0.02)
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        server.kill()
        await server.wait()


async def ping(url: str) -> str:
    """What came of it."""
    client = connect(url)
    try:
        assert await client.ping()
    except FAILURES as error:
        return reason_of(error)
    finally:
        await client.aclose()
    return "served"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates")
async def test_tls_and_a_password(redis_server, tmp_path: Path) -> None:
    own, other = certificate(tmp_path, "own"), certificate(tmp_path, "other")
    redis_server.kill()
    async with over_tls(redis_server.directory, "secret", own) as port:
        at = f"localhost:{port}/0"
        assert await ping(f"rediss://:secret@{at}?ssl_ca_certs={own}") == "served"
        assert "invalid username-password" in await ping(f"rediss://:no@{at}?ssl_ca_certs={own}")
        assert "authenticat" in await ping(f"rediss://{at}?ssl_ca_certs={own}")
        unsure = f"rediss://:secret@127.0.0.1:{port}?ssl_ca_certs={own}"
        assert "CERTIFICATE_VERIFY_FAILED" in await ping(unsure)
        assert "CERTIFICATE_VERIFY_FAILED" in await ping(f"rediss://:secret@{at}")
        assert "VERIFY" in await ping(f"rediss://:secret@{at}?ssl_ca_certs={other}")
        assert await ping(f"redis://:secret@{at}") != "served"
