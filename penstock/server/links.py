"""`POST /cluster/workers/{worker}/links`: a worker tries how it reaches the KV of every other one.

Owns the form in which that is asked and answered; the cluster does it, behind `LinkTester`. Nothing
is changed, but what is measured shares cores and links with what is served. `penstock doctor
--cluster` asks here.
"""

import msgspec
from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from penstock.core.errors import BackendUnavailable, BadRequest
from penstock.core.links import MOVED_BYTES, MOVED_BYTES_MAX, Link, LinksTried, WayTried
from penstock.core.service import LinkTester
from penstock.core.types import NS_PER_S, WorkerId
from penstock.server.asgi import JSON, read_body
from penstock.server.cluster import BODY_BYTES_MAX, BODY_TIMEOUT_S
from penstock.server.gate import CALLER, id_header
from penstock.server.schema import decode_body


class TryLinksBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /cluster/workers/{worker}/links`: measure with so many bytes."""

    moved_bytes: int = MOVED_BYTES


class WayView(Struct, kw_only=True):
    """A transport. `refusal` says why it does not lead there, "" where it does; `used` marks the
    one that requests take.

    `share` is the rate over what `limit` does, 0 where nothing is known of the link.
    """

    kind: str
    name: str
    used: bool
    refusal: str
    opening_s: float
    num_bytes: int
    bytes_per_s: float
    limit: str
    share: float


class LinkView(Struct, kw_only=True):
    """What was found of one owner: its KV layout, why that is of no use here ("" when it is), and
    its clock less the reader's, None when it did not answer.
    """

    owner: str
    fingerprint: str
    incompatibility: str
    clock_skew_s: float | None
    clock_skew_within_s: float
    ways: list[WayView]


class LinksView(Struct, kw_only=True):
    """Answer of `POST /cluster/workers/{worker}/links`."""

    reader: str
    fingerprint: str
    links: list[LinkView]


class LinksApi:
    """The endpoint."""

    def __init__(self, tester: LinkTester | None) -> None:
        self._tester = tester
        self._bodies = msgspec.json.Decoder(TryLinksBody)

    async def try_links(self, request: HttpRequest) -> Response:
        """Have a worker try its links."""
        if self._tester is None:
            raise BackendUnavailable("this server has no workers that could try their links")
        sent = await read_body(request.scope, request.receive, BODY_BYTES_MAX, BODY_TIMEOUT_S)
        moved_bytes = decode_body(self._bodies, sent or b"{}").moved_bytes
        if not 0 < moved_bytes <= MOVED_BYTES_MAX:
            raise BadRequest(f"{moved_bytes}: 1 to {MOVED_BYTES_MAX} bytes", "moved_bytes")
        worker_id = WorkerId(request.path_params["worker"])
        body = msgspec.json.encode(view(await self._tester.try_links(worker_id, moved_bytes)))
        response = Response(body, media_type=JSON.decode())
        response.raw_headers.extend(id_header(request.scope[CALLER]))
        return response


def view(tried: LinksTried) -> LinksView:
    """Return what was found as it is shown."""
    return LinksView(
        reader=tried.worker_id,
        fingerprint=tried.fingerprint,
        links=[_view_link(link) for link in tried.links],
    )


def _view_link(link: Link) -> LinkView:
    return LinkView(
        owner=link.owner,
        fingerprint=link.fingerprint,
        incompatibility=link.incompatibility,
        clock_skew_s=None if link.skew_ns is None else link.skew_ns / NS_PER_S,
        clock_skew_within_s=link.skew_within_ns / NS_PER_S,
        ways=[_view_way(way) for way in link.ways],
    )


def _view_way(way: WayTried) -> WayView:
    limit = way.limit_bytes_per_s
    return WayView(
        kind=way.kind,
        name=way.name,
        used=way.is_used,
        refusal=way.refusal,
        opening_s=way.opening_ns / NS_PER_S,
        num_bytes=way.num_bytes,
        bytes_per_s=round(way.bytes_per_s),
        limit=way.limit,
        share=round(way.bytes_per_s / limit, 4) if limit else 0.0,
    )
