"""`GET /cluster/requests/{id}/explanation`: why a request went where it went.

Owns by which names a client may ask: its own `X-Request-Id`, the response's id, or that of one
choice. What is known is the cluster's affair; `app.py` notes what was asked for and routes to here.
"""

from collections import OrderedDict
from typing import Final

import msgspec
from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from penstock.core.errors import UnknownRequest
from penstock.core.explain import Explanation
from penstock.core.service import Service
from penstock.core.types import RequestId
from penstock.server.asgi import JSON
from penstock.server.gate import CALLER, id_header
from penstock.server.intake import Caller, Query

KEPT_MAX: Final = 2000
"""Names; a response has two."""


class ExplainedRequests(Struct, kw_only=True):
    """Its answer: an explanation of every choice of the response."""

    id: str
    requests: list[Explanation]


class ExplanationApi:
    """The endpoint, and which requests a name stands for. The oldest name is forgotten first."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ids: OrderedDict[str, tuple[RequestId, ...]] = OrderedDict()

    def note(self, caller: Caller, query: Query) -> None:
        """Remember what was asked for, under the names that the client knows."""
        ids = tuple(request.request_id for request in query.requests)
        for name in (caller.request_id, query.query_id):
            self._ids[name] = ids
            self._ids.move_to_end(name)
        while len(self._ids) > KEPT_MAX:
            self._ids.popitem(last=False)

    def ids_of(self, name: str) -> tuple[RequestId, ...]:
        """Return the requests that a client's name stands for; as it is if nobody knows it."""
        return self._ids.get(name, (RequestId(name),))

    async def show(self, request: HttpRequest) -> Response:
        """Say why the requests of a response went where they went."""
        name = request.path_params["request_id"]
        found = [e for e in map(self._service.explain, self.ids_of(name)) if e is not None]
        if not found:
            raise UnknownRequest(_advice(name, is_known=name in self._ids), "request_id")
        body = msgspec.json.encode(ExplainedRequests(id=name, requests=found))
        response = Response(body, media_type=JSON.decode())
        response.raw_headers.extend(id_header(request.scope[CALLER]))
        return response


def _advice(name: str, *, is_known: bool) -> str:
    if is_known:
        return f"{name} has not been given to a worker: it waits, or was refused"
    return (
        f"nothing is known of {name}: ask by the X-Request-Id or the id of one of the latest "
        "responses; older ones are in the file of --decision-log (penstock explain --log)"
    )
