"""Every way a request can fail, named once.

    BatonError(cause, message, param)      anything that ends or diverts one request
     └─ InvalidRequest                     the client's fault; `param` names the field

`Cause` carries what everybody who sees it needs to know: may the same request be tried elsewhere,
whose fault it is, and which status it has over HTTP. The gRPC status is derived in `baton.rpc`, the
OpenAI error body in `baton.gateway`; nobody else maps.
"""

from enum import IntEnum, StrEnum
from typing import NamedTuple


class Fault(StrEnum):
    """Whose fault a failure is."""

    CLIENT = "client"
    CAPACITY = "capacity"
    PEER = "peer"
    OURS = "ours"


class CauseInfo(NamedTuple):
    retryable: bool  # the same request may succeed on another worker, or later
    fault: Fault
    http_status: int


class Cause(IntEnum):
    """Why something failed. Numbers are the wire's (`baton.v1.Cause`); 0 is never sent."""

    INVALID_REQUEST = 1
    CONTEXT_LENGTH_EXCEEDED = 2
    MODEL_NOT_FOUND = 3
    UNAUTHENTICATED = 4
    NEVER_FITS = 5  # needs more KV blocks than the worker has in total
    NO_ROOM = 10  # no KV blocks now
    OVERLOADED = 11  # bounded queue full
    DRAINING = 12
    NO_WORKER = 13  # no route is up
    WORKER_LOST = 20  # died, or its heartbeat stopped
    SESSION_LOST = 21
    DEADLINE_EXCEEDED = 22
    CANCELLED = 23
    STEP_FAILED = 30  # an engine step raised
    NON_FINITE_LOGITS = 31
    TICKET_FORGED = 40
    TICKET_EXPIRED = 41
    EPOCH_MISMATCH = 42
    TENANT_MISMATCH = 43
    MODEL_MISMATCH = 44  # fingerprints differ
    TOKENS_MISMATCH = 45  # the ticket is for other token ids
    LEASE_UNKNOWN = 46  # released, evicted, or from an earlier incarnation
    LAYOUT_INCOMPATIBLE = 47
    FRAME_CORRUPT = 50
    FRAME_ORDER = 51  # sequence number or range is not the expected one
    FRAME_TRUNCATED = 52
    TRANSPORT_FAILED = 53
    TRANSFER_STALLED = 54  # no progress within the deadline derived from size and rate
    PROTOCOL = 60  # a message that no correct peer sends
    UNSUPPORTED = 61
    INTERNAL = 70

    @property
    def info(self) -> CauseInfo:
        return _INFO[self]

    @property
    def retryable(self) -> bool:
        return self.info.retryable

    @property
    def http_status(self) -> int:
        return self.info.http_status


_CLIENT = {
    Cause.INVALID_REQUEST: 400,
    Cause.CONTEXT_LENGTH_EXCEEDED: 400,
    Cause.MODEL_NOT_FOUND: 404,
    Cause.UNAUTHENTICATED: 401,
    Cause.NEVER_FITS: 400,
    Cause.CANCELLED: 499,
    Cause.UNSUPPORTED: 400,
}
_CAPACITY = {
    Cause.NO_ROOM: 503,
    Cause.OVERLOADED: 429,
    Cause.DRAINING: 503,
    Cause.NO_WORKER: 503,
    Cause.DEADLINE_EXCEEDED: 504,
}
_OURS = {Cause.NON_FINITE_LOGITS, Cause.INTERNAL, Cause.PROTOCOL}

_INFO: dict[Cause, CauseInfo] = {
    cause: CauseInfo(False, Fault.CLIENT, _CLIENT[cause])
    if cause in _CLIENT
    else CauseInfo(cause is not Cause.DEADLINE_EXCEEDED, Fault.CAPACITY, _CAPACITY[cause])
    if cause in _CAPACITY
    else CauseInfo(False, Fault.OURS, 500)
    if cause in _OURS
    else CauseInfo(True, Fault.PEER, 502 if cause >= Cause.TICKET_FORGED else 503)
    for cause in Cause
}


class BatonError(Exception):
    """Ends or diverts one request; never a worker."""

    def __init__(self, cause: Cause, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message
        self.param = param


class InvalidRequest(BatonError):
    """The client sent something that cannot be served; `param` names the field."""

    def __init__(
        self, message: str, param: str | None = None, cause: Cause = Cause.INVALID_REQUEST
    ) -> None:
        super().__init__(cause, message, param)
