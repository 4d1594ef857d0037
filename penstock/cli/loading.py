"""`LoadingGate`: the ASGI application from the first moment on: answers 503 until there is a model.

A load balancer can tell a server that loads from one that is not there, and nobody waits in the
dark. It hands everything over to the real application once `app` is set.
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.server.asgi import respond
from penstock.server.errors import http_error_body

RETRY_AFTER = [(b"retry-after", b"1")]


class LoadingGate:
    """`describe` says how far the loading is."""

    def __init__(self, describe: Callable[[], str]) -> None:
        self.app: ASGIApp | None = None
        self._describe = describe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or say that the model is loading."""
        if self.app is not None:
            await self.app(scope, receive, send)
        else:
            await respond(send, 503, http_error_body(503, self._describe()), RETRY_AFTER)
