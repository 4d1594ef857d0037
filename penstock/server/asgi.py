"""The few things of ASGI that every endpoint needs, without a request or response object between.

Owns reading a limited body, sending a whole response, and waking the one task that waits. Called by
`app.py` and `stream.py`.
"""

import asyncio
from collections.abc import Callable, Iterable

from starlette.types import Receive, Scope, Send

from penstock.core.errors import BadRequest
from penstock.server.errors import BodyTooLarge, BodyTooSlow, Headers

JSON = b"application/json"


class Doorbell:
    """One task waits, anybody rings. A ring that nobody waits for is kept, several are one."""

    __slots__ = ("_has_rung", "_waiter")

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None
        self._has_rung = False

    def ring(self) -> None:
        """Wake the waiting task, now or when it comes to wait."""
        waiter = self._waiter
        if waiter is None:
            self._has_rung = True
        elif not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Return at the next ring."""
        if self._has_rung:
            self._has_rung = False
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first value of a header, or None. `name` is in lower case."""
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), None)


async def read_body(scope: Scope, receive: Receive, limit_bytes: int, timeout_s: float) -> bytes:
    """Return the request's body.

    Raises: `BodyTooLarge` as soon as that is known, `BodyTooSlow`, and `BadRequest` when the client
    goes away.
    """
    announced = header(scope, b"content-length")
    if announced is not None and announced.isdigit() and int(announced) > limit_bytes:
        raise BodyTooLarge(f"the body has {int(announced)} bytes, {limit_bytes} at most")
    try:
        async with asyncio.timeout(timeout_s):
            return await _join_body(receive, limit_bytes)
    except TimeoutError:
        raise BodyTooSlow(f"the body was not complete within {timeout_s:g} s") from None


async def _join_body(receive: Receive, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes, is_complete = 0, False
    while not is_complete:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client went away before the body was complete")
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        is_complete = not message.get("more_body", False)
        if num_bytes > limit_bytes:
            raise BodyTooLarge(f"the body has more than {limit_bytes} bytes")
    return b"".join(parts)


async def watch(receive: Receive, on_gone: Callable[[], None]) -> None:
    """Call back when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_gone()


async def respond(
    send: Send,
    status: int,
    body: bytes,
    headers: Headers | None = None,
    content_type: bytes = JSON,
) -> None:
    """Send a whole response."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type),
                (b"content-length", b"%d" % len(body)),
                *(headers or ()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
