"""The producer's side of the data plane: between the exporter, which reads blocks, and the machine,
which decides who may."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import DecodeError

from baton import wire
from baton.errors import BatonError, Cause
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachmentReady,
    AttachmentSampled,
    AttachRefused,
    CutAttachment,
)
from baton.kvtransfer.exporter import ExportFeed
from baton.tracing import Span, Tracer
from baton.types import TokenChunk
from baton.v1 import kv_pb2

MAX_ATTACHMENTS = 64  # of a worker; each has up to a credit's worth of frames on its way


class ExportEvents(Protocol):
    """Where attachments' events go; carries the effects out."""

    def attach(self, key: int, fetch: FetchOpen) -> None: ...

    def cancel_attach(self, key: int) -> None: ...

    def attachment_progress(self, epoch: int, num_sent_tokens: int) -> None: ...

    def attachment_done(self, epoch: int) -> None: ...

    def attachment_closed(self, epoch: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Asked:
    answer: asyncio.Future[ExportFeed]
    tokens_digest: bytes
    traceparent: str


@dataclass(frozen=True, slots=True)
class _Open:
    feed: ExportFeed
    tokens_digest: bytes

    def end(self, first_tokens: tuple[TokenChunk, ...]) -> None:
        self.feed.end(end_payload(first_tokens, self.tokens_digest))


class ExportDesk:
    """An `ExportGate`: asks the machine and feeds what it grants. Event loop only.

    Made before the machine, because transports start before their addresses are known to it;
    `connect` comes before any fetch.
    """

    _events: ExportEvents

    def __init__(self) -> None:
        self._num_keys = 0
        self._asked: dict[int, _Asked] = {}
        self._open: dict[int, _Open] = {}  # by epoch
        self._spans: dict[int, Span] = {}  # by epoch
        self.tracer: Tracer | None = None

    def __len__(self) -> int:
        return len(self._open)

    def connect(self, events: ExportEvents) -> None:
        self._events = events

    # ── for the exporter ─────────────────────────────────────────────────────────────────────────

    async def attach(self, fetch: FetchOpen) -> ExportFeed:
        if len(self._open) + len(self._asked) >= MAX_ATTACHMENTS:
            raise BatonError(Cause.OVERLOADED, "too many readers of this worker")
        self._num_keys += 1
        key = self._num_keys
        answer: asyncio.Future[ExportFeed] = asyncio.get_running_loop().create_future()
        self._asked[key] = _Asked(answer, fetch.tokens_digest, fetch.traceparent)
        self._events.attach(key, fetch)
        try:
            return await answer
        except asyncio.CancelledError:
            if self._asked.pop(key, None) is not None:
                self._events.cancel_attach(key)
            elif not answer.cancelled() and answer.exception() is None:
                self.closed(answer.result().epoch)  # granted, but nobody is there any more
            raise

    def progress(self, epoch: int, num_sent_tokens: int) -> None:
        self._events.attachment_progress(epoch, num_sent_tokens)

    def done(self, epoch: int) -> None:
        self._events.attachment_done(epoch)

    def closed(self, epoch: int) -> None:
        span = self._spans.pop(epoch, None)
        if span is not None:
            span.end()
        if self._open.pop(epoch, None) is not None:
            self._events.attachment_closed(epoch)

    # ── from the machine ─────────────────────────────────────────────────────────────────────────

    def granted(self, grant: AttachGranted) -> None:
        asked = self._asked.pop(grant.key)
        feed = ExportFeed(grant.epoch, grant.block_ids, grant.ready)
        opened = self._open[grant.epoch] = _Open(feed, asked.tokens_digest)
        if self.tracer is not None and asked.traceparent:
            self._spans[grant.epoch] = self.tracer.begin("serve_fetch", asked.traceparent)
        if grant.first_tokens is not None:
            opened.end(grant.first_tokens)
        if asked.answer.cancelled():
            self.closed(grant.epoch)
        else:
            asked.answer.set_result(feed)

    def refused(self, refusal: AttachRefused) -> None:
        answer = self._asked.pop(refusal.key).answer
        if not answer.cancelled():
            answer.set_exception(BatonError(refusal.cause, refusal.detail))

    def ready(self, event: AttachmentReady) -> None:
        for epoch in event.epochs:
            self._open[epoch].feed.advance(event.ready)

    def sampled(self, event: AttachmentSampled) -> None:
        for epoch in event.epochs:
            self._open[epoch].end(event.first_tokens)

    def cut(self, event: CutAttachment) -> None:
        self._open[event.epoch].feed.cut(BatonError(event.cause, event.detail))


def end_payload(first_tokens: tuple[TokenChunk, ...], tokens_digest: bytes) -> bytes:
    """What the end frame carries."""
    chunks = [wire.chunk_to_pb(chunk) for chunk in first_tokens]
    return kv_pb2.EndOfKV(first_tokens=chunks, tokens_digest=tokens_digest).SerializeToString()


def parse_end_payload(payload: bytes, tokens_digest: bytes) -> list[TokenChunk]:
    """The first tokens.

    Raises:
        BatonError: PROTOCOL; TOKENS_MISMATCH for KV of another prompt.
    """
    try:
        end = kv_pb2.EndOfKV.FromString(payload)
    except DecodeError as error:
        raise wire.refuse("end of KV") from error
    if end.tokens_digest != tokens_digest:
        raise BatonError(Cause.TOKENS_MISMATCH, "the end frame is of another prompt")
    return [wire.chunk_from_pb(chunk) for chunk in end.first_tokens]
