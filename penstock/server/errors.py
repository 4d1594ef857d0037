"""How an error reaches a client: status code and the error object of the OpenAI API.

Owns the one table from error classes to codes. `app.py` and `gate.py` answer with it, `openai.py`
writes it into a stream that has begun.
"""

import math
from http import HTTPStatus

import msgspec
from msgspec import Struct

from penstock.core.errors import (
    BackendUnavailable,
    BadRequest,
    BlocksCorrupt,
    CapacityExceeded,
    DeadlineExceeded,
    PeerLost,
    PenstockError,
    PromptTooLong,
    StartupFailed,
    Unauthorized,
    UnknownModel,
    UnknownRequest,
    UnknownWorker,
    WorkersUnavailable,
)

Headers = list[tuple[bytes, bytes]]


class BodyTooLarge(BadRequest):
    """The body is larger than the server takes."""


class BodyTooSlow(BadRequest):
    """The body did not arrive in time."""


class ErrorKind(Struct, frozen=True):
    """What a class of errors means in HTTP; `code` and `type` are words of the OpenAI API."""

    status: int
    type: str
    code: str


ERROR_KINDS: dict[type[PenstockError], ErrorKind] = {
    BadRequest: ErrorKind(400, "invalid_request_error", "invalid_value"),
    PromptTooLong: ErrorKind(400, "invalid_request_error", "context_length_exceeded"),
    UnknownModel: ErrorKind(404, "invalid_request_error", "model_not_found"),
    UnknownWorker: ErrorKind(404, "invalid_request_error", "worker_not_found"),
    UnknownRequest: ErrorKind(404, "invalid_request_error", "request_not_found"),
    BodyTooLarge: ErrorKind(413, "invalid_request_error", "request_too_large"),
    BodyTooSlow: ErrorKind(408, "invalid_request_error", "request_timeout"),
    Unauthorized: ErrorKind(401, "authentication_error", "invalid_api_key"),
    CapacityExceeded: ErrorKind(429, "rate_limit_error", "capacity_exceeded"),
    WorkersUnavailable: ErrorKind(503, "service_unavailable", "workers_unavailable"),
    StartupFailed: ErrorKind(503, "service_unavailable", "startup_failed"),
    PeerLost: ErrorKind(502, "server_error", "worker_lost"),
    BlocksCorrupt: ErrorKind(502, "server_error", "blocks_corrupt"),
    DeadlineExceeded: ErrorKind(504, "server_error", "deadline_exceeded"),
    BackendUnavailable: ErrorKind(501, "server_error", "backend_unavailable"),
    PenstockError: ErrorKind(500, "server_error", "internal_error"),
}


class ErrorDetail(Struct, kw_only=True):
    """What went wrong. `param` is the path of the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Struct):
    """The error object of the OpenAI API."""

    error: ErrorDetail


def error_kind(error: PenstockError) -> ErrorKind:
    """Return the entry of the nearest ancestor of the error's class."""
    return next(ERROR_KINDS[cls] for cls in type(error).__mro__ if cls in ERROR_KINDS)


def error_body(error: PenstockError) -> bytes:
    """Return the error object as JSON."""
    kind = error_kind(error)
    return msgspec.json.encode(
        ErrorBody(
            ErrorDetail(
                message=str(error),
                type=kind.type,
                param=getattr(error, "field", None),
                code=kind.code,
            )
        )
    )


def http_error_body(status: int, message: str | None = None) -> bytes:
    """Return the error object for what the router refuses: no such path, no such method."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    words = message or HTTPStatus(status).phrase
    code = HTTPStatus(status).name.lower()
    return msgspec.json.encode(ErrorBody(ErrorDetail(message=words, type=kind, code=code)))


def error_headers(error: PenstockError) -> Headers:
    """Return what a client needs besides the body: when to come back, how to authenticate."""
    match error:
        case CapacityExceeded(retry_after_s=seconds):
            return [
                (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
                (b"retry-after-ms", b"%d" % max(1, math.ceil(seconds * 1000))),
            ]
        case Unauthorized():
            return [(b"www-authenticate", b"Bearer")]
    return []
