"""What every HTTP request passes first: its id, and the API key.

Owns who may call what. `app.py` puts it around the routes.
"""

import math
import re
import secrets
from hmac import compare_digest
from time import monotonic_ns

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import BadRequest, PenstockError, Unauthorized
from penstock.server.asgi import header, respond
from penstock.server.errors import Headers, error_body, error_headers, error_kind
from penstock.server.intake import Caller
from penstock.server.schema import RETENTION_MAX_S

# Probes, scrapers and readers of the documentation hold no key, and learn nothing of anybody.
OPEN_PATHS = frozenset({"/health", "/metrics", "/version", "/docs", "/openapi.json"})

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_FAIRNESS = b"x-llm-d-inference-fairness-id"
_SLO_TTFT, _SLO_TPOT = b"x-slo-ttft-ms", b"x-slo-tpot-ms"
_SLO_MAX_MS = 1e9
_RETENTION_TTL, _KV_PIN = b"x-penstock-retention-ttl", b"x-penstock-kv-pin"


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
        number = self._key_number(scope)
        is_told_apart = number is not None and len(self._keys) > 1
        caller = scope[CALLER] = _caller(scope, f"key-{number}" if is_told_apart else "")
        error = self._refusal(scope, has_key=number is not None)
        if error is not None:
            await respond_error(send, error, caller)
            return
        await self._app(scope, receive, send)

    def _key_number(self, scope: Scope) -> int | None:
        """Return which of the keys the caller has; None for none of them."""
        given = header(scope, b"authorization") or b""
        scheme, _, key = given.partition(b" ")
        # Every key is compared, whole, so that the time taken tells nothing.
        matches = [compare_digest(key.strip(), own) for own in self._keys]
        is_bearer = scheme.lower() == b"bearer"
        return matches.index(True) if is_bearer and any(matches) else None

    def _refusal(self, scope: Scope, *, has_key: bool) -> PenstockError | None:
        own_id = header(scope, b"x-request-id")
        if own_id is not None and not _REQUEST_ID.fullmatch(own_id):
            return BadRequest("the id must be 1 to 128 printable ASCII characters", "X-Request-Id")
        if self._keys and not has_key and scope["path"] not in OPEN_PATHS:
            is_wrong = header(scope, b"authorization")
            missing = "no API key: send `Authorization: Bearer <key>`"
            return Unauthorized("wrong API key" if is_wrong else missing)
        tenant = header(scope, _FAIRNESS)
        if tenant and not _REQUEST_ID.fullmatch(tenant):
            return BadRequest("it must be 1 to 128 printable ASCII characters", _FAIRNESS.decode())
        for name in (_SLO_TTFT, _SLO_TPOT):
            if header(scope, name) is not None and _milliseconds(scope, name) is None:
                return BadRequest("it must be a number of milliseconds above 0", name.decode())
        if header(scope, _RETENTION_TTL) is not None and _retention_s(scope) is None:
            wanted = f"it must be a number of seconds, at most {RETENTION_MAX_S:g}"
            return BadRequest(wanted, _RETENTION_TTL.decode())
        pin = header(scope, _KV_PIN)
        if pin is not None and not _REQUEST_ID.fullmatch(pin):
            return BadRequest("it must be 1 to 128 printable ASCII characters", _KV_PIN.decode())
        return None


CALLER = "penstock.caller"


def _caller(scope: Scope, key_name: str) -> Caller:
    own_id = header(scope, b"x-request-id")
    is_own = own_id is not None and _REQUEST_ID.fullmatch(own_id) is not None
    return Caller(
        arrived_ns=monotonic_ns(),
        request_id=own_id.decode() if own_id is not None and is_own else secrets.token_hex(12),
        is_own_id=is_own,
        wants_ledger=header(scope, b"x-penstock-ledger") not in (None, b"", b"0"),
        fairness_key=_tenant(scope, key_name),
        slo_ttft_ms=_milliseconds(scope, _SLO_TTFT),
        slo_tpot_ms=_milliseconds(scope, _SLO_TPOT),
        retention_s=_retention_s(scope),
        kv_pin=(header(scope, _KV_PIN) or b"").decode("latin-1"),
    )


def _tenant(scope: Scope, key_name: str) -> str:
    """Return whose share of the cluster a request takes: that of its API key where there are
    several, for else a client could take more shares by more names; otherwise of whom it names.
    """
    return key_name or (header(scope, _FAIRNESS) or b"").decode("latin-1")


def _milliseconds(scope: Scope, name: bytes) -> float | None:
    """Return the time that a header gives; None without one, or if it is none."""
    value = _number(scope, name)
    return value if 0 < value < _SLO_MAX_MS else None


def _retention_s(scope: Scope) -> float | None:
    """Return for how long KV is to be kept; None where no header says so."""
    value = _number(scope, _RETENTION_TTL)
    return value if 0 <= value <= RETENTION_MAX_S else None


def _number(scope: Scope, name: bytes) -> float:
    """Return the number that a header gives; NaN, which is within no bounds, if it gives none."""
    try:
        return float(header(scope, name) or math.nan)
    except ValueError:
        return math.nan


def id_header(caller: Caller) -> Headers:
    """Return the header that names the request in every response."""
    return [(b"x-request-id", caller.request_id.encode())]


async def respond_error(send: Send, error: PenstockError, caller: Caller) -> None:
    """Send an error as a whole response."""
    headers = error_headers(error) + id_header(caller)
    await respond(send, error_kind(error).status, error_body(error), headers)
