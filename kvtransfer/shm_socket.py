"""The unix socket beside a shared-memory fetch: it proves that two workers share a kernel and a
file system, hands the ring over and says which slots are filled.

    consumer → producer    token of the fetch (32 bytes), once per fetch
    producer → consumer    the ring's file descriptor, once per connection, before the first frame
    producer → consumer    slot, length (u32 each): a frame is there

The token travels in the authenticated `KV.Fetch` call as well, so a connection is good for nothing
but the fetches of whoever made such a call; only the user who runs the worker can connect at all:
the socket's folder and the socket are theirs alone, and both ends ask the kernel who the other is.
A connection goes on to the next fetch between the same two workers when one has ended well.
"""

import os
import shutil
import socket
import stat
import struct
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from baton.errors import BatonError, Cause

TOKEN_BYTES = 32
POSTED = struct.Struct("<II")
_PEER = struct.Struct("3i")  # pid, uid, gid
_PREFIX, _NAME = "baton-kv-", "kv"


def boot_id() -> str:
    """One per kernel and boot; containers share their host's."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class Place:
    """Where a producer's socket is, so that a consumer can tell whether it is the same one that it
    sees: same kernel, same file."""

    def __init__(self, host: str, boot: str, inode: str, path: str) -> None:
        self.host = host
        self._boot = boot
        self._inode = inode
        self.path = path

    @classmethod
    def of(cls, host: str, path: str) -> "Place":
        """
        Args:
            host: host:port at which the producer serves `KV.Fetch`.
        """
        return cls(host, boot_id(), _inode(path), path)

    @classmethod
    def parse(cls, address: str) -> "Place":
        """
        Raises:
            BatonError: TRANSPORT_FAILED; not such an address.
        """
        parts = address.split("/", 3)
        if len(parts) != 4:
            raise BatonError(Cause.TRANSPORT_FAILED, f"no shared memory at {address!r}")
        return cls(parts[0], parts[1], parts[2], "/" + parts[3])

    def __str__(self) -> str:
        return f"{self.host}/{self._boot}/{self._inode}{self.path}"

    def is_here(self) -> bool:
        try:
            return self._boot == boot_id() and self._inode == _inode(self.path)
        except OSError:
            return False


def _inode(path: str) -> str:
    found = os.stat(path)
    if not stat.S_ISSOCK(found.st_mode):
        raise FileNotFoundError(path)
    return f"{found.st_dev:x}.{found.st_ino:x}"


def unix_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setblocking(False)
    return made


def listen() -> tuple[socket.socket, str]:
    """A listening socket, and its path in a folder of its own that nobody else may enter.

    Raises:
        OSError: there can be no such socket here.
    """
    _remove_dead()
    path = str(Path(tempfile.mkdtemp(prefix=_PREFIX), _NAME))
    listening = unix_socket()
    try:
        listening.bind(path + ".new")
        os.chmod(path + ".new", 0o600)
        listening.listen(128)
        Path(path + ".new").rename(path)  # who finds it, can connect
    except OSError:
        listening.close()
        remove(path)
        raise
    return listening, path


def is_same_user(connection: socket.socket) -> bool:
    """Does the other end belong to the user who runs this process?"""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(peer)[1]) == os.geteuid()


def remove(path: str) -> None:
    shutil.rmtree(Path(path).parent, ignore_errors=True)


def _remove_dead() -> None:
    """Folders of workers that were killed: nobody answers there any more."""
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and _is_dead(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    if not (folder / _NAME).exists():
        return time.time() - folder.stat().st_mtime > 60  # not one that is being made
    with unix_socket() as probe:
        try:
            probe.connect(str(folder / _NAME))
        except ConnectionRefusedError:
            return True
    return False
