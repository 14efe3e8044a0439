"""What a `WorkerMachine` asks for. Carry effects out in the order they come."""

from dataclasses import dataclass
from typing import NewType

from baton.engine.commands import Command
from baton.errors import Cause
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachmentReady,
    AttachmentSampled,
    AttachRefused,
    CancelFetch,
    CutAttachment,
)
from baton.messages import WorkerMessage
from baton.types import BlockId, LegId, TransportAddress

SessionId = NewType("SessionId", int)


@dataclass(frozen=True, slots=True)
class Send:
    """To one gateway, after everything sent to it before."""

    session: SessionId
    message: WorkerMessage


@dataclass(frozen=True, slots=True)
class CloseSession:
    """The gateway has been silent for too long; its legs are aborted already."""

    session: SessionId
    cause: Cause
    detail: str


@dataclass(frozen=True, slots=True)
class Post:
    """To the engine, after everything posted before."""

    command: Command


@dataclass(frozen=True, slots=True)
class FetchKV:
    """Fetch `fetch.range` into the blocks by the best of `transports`. Ends in exactly one
    `fetch_ended` or `fetch_failed`, after the last write."""

    leg: LegId
    fetch: FetchOpen
    transports: tuple[TransportAddress, ...]  # the producer's, in its order of preference
    host_id: str  # the producer's
    block_ids: tuple[BlockId, ...]  # cover prompt tokens [0, fetch.range.token_stop) in order


Effect = (
    Send
    | CloseSession
    | Post
    | FetchKV
    | CancelFetch
    | AttachGranted
    | AttachRefused
    | AttachmentReady
    | AttachmentSampled
    | CutAttachment
)
