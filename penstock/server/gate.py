"""What every HTTP request passes first: its id, and the API key.

Owns who may call what. `app.py` puts it around the routes.
"""

import re
import secrets
from hmac import compare_digest
from time import monotonic_ns

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import BadRequest, PenstockError, Unauthorized
from penstock.server.asgi import header, respond
from penstock.server.errors import Headers, error_body, error_headers, error_kind
from penstock.server.intake import Caller

# Probes, scrapers and readers of the documentation hold no key, and learn nothing of anybody.
OPEN_PATHS = frozenset({"/health", "/metrics", "/version", "/docs", "/openapi.json"})

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware. Leaves a `Caller` in the scope under `CALLER`."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = scope[CALLER] = _caller(scope)
        error = self._refusal(scope)
        if error is not None:
            await respond_error(send, error, caller)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> PenstockError | None:
        own_id = header(scope, b"x-request-id")
        if own_id is not None and not _REQUEST_ID.fullmatch(own_id):
            return BadRequest("the id must be 1 to 128 printable ASCII characters", "X-Request-Id")
        if not self._keys or scope["path"] in OPEN_PATHS:
            return None
        given = header(scope, b"authorization") or b""
        scheme, _, key = given.partition(b" ")
        # Every key is compared, whole, so that the time taken tells nothing.
        matches = [compare_digest(key.strip(), own) for own in self._keys]
        if scheme.lower() == b"bearer" and any(matches):
            return None
        reason = "wrong API key" if given else "no API key: send `Authorization: Bearer <key>`"
        return Unauthorized(reason)


CALLER = "penstock.caller"


def _caller(scope: Scope) -> Caller:
    own_id = header(scope, b"x-request-id")
    is_own = own_id is not None and _REQUEST_ID.fullmatch(own_id) is not None
    return Caller(
        arrived_ns=monotonic_ns(),
        request_id=own_id.decode() if own_id is not None and is_own else secrets.token_hex(12),
        is_own_id=is_own,
        wants_ledger=header(scope, b"x-penstock-ledger") not in (None, b"", b"0"),
    )


def id_header(caller: Caller) -> Headers:
    """Return the header that names the request in every response."""
    return [(b"x-request-id", caller.request_id.encode())]


async def respond_error(send: Send, error: PenstockError, caller: Caller) -> None:
    """Send an error as a whole response."""
    headers = error_headers(error) + id_header(caller)
    await respond(send, error_kind(error).status, error_body(error), headers)
