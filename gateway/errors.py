"""The OpenAI error body, and the one place where an exception becomes an HTTP answer.

Statuses come from `Cause`. What the client did wrong, and that capacity is short, is said in words;
what failed behind the gateway is named by its cause only, because details may hold addresses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from baton.errors import BatonError, Cause, Fault

_MAX_MESSAGE_CHARS = 1000

_STATUS_CODES = {
    400: "bad_request",
    404: "unknown_url",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
}
_PLACES = (("body",), ("query",), ("path",))
_CAUSE_CODES = {
    Cause.INVALID_REQUEST: None,
    Cause.UNAUTHENTICATED: "invalid_api_key",
    Cause.OVERLOADED: "server_is_overloaded",
    Cause.NO_ROOM: "server_is_overloaded",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None  # the field at fault
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not 2xx; for the OpenAPI document."""

    error: ErrorDetail


class Refusal(HTTPException):
    """What HTTP alone knows of, with the code and the field that its answer names."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.param = param


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served."},
    "5XX": {"model": ErrorResponse, "description": "No capacity, or a failure of the server."},
}


@dataclass(frozen=True, slots=True)
class ApiError:
    """What a client is told."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_exceeded"
        if self.status == 503:
            return "service_unavailable_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message[:_MAX_MESSAGE_CHARS],
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=dict(self.headers))


def api_error(error: BaseException, request_id: str) -> ApiError:
    """Map any exception. `request_id` is quoted where the message says nothing else of use."""
    match error:
        case BatonError():
            return _from_baton_error(error, request_id)
        case RequestValidationError():
            return _from_validation(error.errors())
        case Refusal():
            headers = error.headers or {}
            return ApiError(error.status_code, error.detail, error.param, error.code, headers)
        case HTTPException():
            code = _STATUS_CODES.get(error.status_code)
            return ApiError(error.status_code, error.detail, code=code, headers=error.headers or {})
        case ClientDisconnect():
            gone = BatonError(Cause.CANCELLED, "the client closed the connection")
            return _from_baton_error(gone, request_id)
    return _from_baton_error(BatonError(Cause.INTERNAL, ""), request_id)


def _from_baton_error(error: BatonError, request_id: str) -> ApiError:
    cause = error.cause
    if cause.info.fault in (Fault.CLIENT, Fault.CAPACITY):
        message = error.message
    elif cause.info.fault is Fault.PEER:
        message = f"A worker failed ({cause.name.lower()}). The same request may work now."
    else:
        message = f"Internal error. Request id: {request_id}"
    headers = {"WWW-Authenticate": "Bearer"} if cause is Cause.UNAUTHENTICATED else {}
    code = _CAUSE_CODES.get(cause, cause.name.lower())
    return ApiError(cause.http_status, message, error.param, code, headers)


def _from_validation(errors: Sequence[Any]) -> ApiError:
    """The first fault by name; the others are counted. Input is not repeated, keys included."""
    first = errors[0]
    path = list(first["loc"][1:] if first["loc"][:1] in _PLACES else first["loc"])
    where = [str(part) for part in path if part in path[:1] or isinstance(part, int)]
    message = f"{'.'.join(where) or 'body'}: {first['msg']}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return ApiError(400, message, where[0] if where else None)
