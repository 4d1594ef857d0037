"""`GET /kv/residency`: where the KV blocks of the cluster are.

Owns the form in which that is asked and answered: totals per worker, pool and tier, and with
`detail=1` or a filter single blocks, a page at a time. What is known is the affair of the workers:
they are asked anew each time. `app.py` routes to here.
"""

import re
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from penstock.core.errors import BackendUnavailable, BadRequest
from penstock.core.residency import (
    ENTRIES_MAX,
    KVQuery,
    KVSurvey,
    PlacedBlock,
    PoolResidency,
    Surveyed,
    TierResidency,
)
from penstock.core.service import KVDirectory
from penstock.core.types import NS_PER_S, RequestId, WorkerId
from penstock.server.asgi import JSON
from penstock.server.gate import CALLER, id_header

ENTRIES_DEFAULT: Final = 100
PARAMETERS: Final = {
    "detail": "`1` adds single blocks, a page at a time.",
    "worker": "Only this worker.",
    "request": "Only blocks of this live request: its X-Request-Id or the id of its response.",
    "prefix": "Only blocks whose name begins with these hexadecimal digits.",
    "limit": f"Blocks of a page (default {ENTRIES_DEFAULT}, at most {ENTRIES_MAX}).",
    "after": "The `next` of the page before.",
}
_CURSOR: Final = re.compile(r"(.+):(\d{1,9}):(\d{1,12})")
_DIGITS: Final = re.compile(r"[0-9a-f]{1,32}")


class PoolView(Struct, kw_only=True):
    """A worker's pool of one group of layers, in blocks. `longest_free_run` may be written in one
    piece. `retained` counts names that are to be kept longer than others.
    """

    window: int
    blocks: int
    free: int
    active: int
    cached: int
    longest_free_run: int
    block_bytes: int
    codec: str
    retained: int


class TierView(Struct, kw_only=True):
    """A tier below a worker's pool: slots of one block each, and totals since its start.

    Slots hold blocks by way of `codec`, and `decode_ns` is what getting one back is expected to
    cost beside the copy. `arriving` are being written, `reading` are on their way to the pool.
    Requests waited `exposed_ns` for moves out of it. `bytes_in` and `bytes_out` count slots, the
    `raw` ones the same as blocks; the codec has taken `codec_encode_ns` and `codec_decode_ns`, and
    requests waited `codec_exposed_ns` for it.
    """

    name: str
    slots: int
    used: int
    codec: str
    slot_bytes: int
    arriving: int
    reading: int
    hits: int
    bytes_in: int
    bytes_out: int
    corrupt: int
    failed: int
    evicted: int
    exposed_ns: int
    decode_ns: int
    raw_bytes_in: int
    raw_bytes_out: int
    codec_encode_ns: int
    codec_decode_ns: int
    codec_exposed_ns: int


class KVWorkerView(Struct, kw_only=True):
    """Where a worker's blocks are. `onboards` counts requests' prefixes on their way up."""

    id: str
    epoch: int
    pools: list[PoolView]
    tiers: list[TierView]
    onboards: int


class BlockView(Struct, kw_only=True, omit_defaults=True):
    """A block in one place: `device` is the worker's pool, the others are its tiers.

    `state`: active (held), cached (kept for hits), spare (may be overwritten), and in a tier
    present, arriving or condemned. `temperature`: hot (worth writing to a tier at once, or held),
    warm (worth it before it is lost) or cold (not worth it). `name` is None until the block is
    full. `idle_s` is the time since its last use, `decode_us` what its codec is expected to take to
    give it back.
    """

    worker: str
    place: str
    group: int
    index: int
    state: str
    name: str | None
    codec: str
    temperature: str
    bytes: int
    holders: int
    in_flight: str = ""
    idle_s: float | None = None
    retained_s: float = 0.0
    decode_us: float = 0.0


class KVResidencyView(Struct, kw_only=True):
    """Answer of `GET /kv/residency`. `silent` workers did not answer in time, so what is said is
    not all there is. `next` is what to ask `after` for the next page, None when that was all.
    """

    workers: list[KVWorkerView]
    silent: list[str]
    blocks: list[BlockView] = []
    next: str | None = None


class ResidencyApi:
    """The endpoint. `ids_of` knows which requests a client's name stands for."""

    def __init__(
        self,
        directory: KVDirectory | None,
        ids_of: Callable[[str], tuple[RequestId, ...]],
    ) -> None:
        self._directory = directory
        self._ids_of = ids_of

    async def show(self, request: HttpRequest) -> Response:
        """Say where blocks are."""
        if self._directory is None:
            raise BackendUnavailable("this server cannot look into its workers")
        query = self._query(request)
        body = msgspec.json.encode(view(await self._directory.survey(query)))
        response = Response(body, media_type=JSON.decode())
        response.raw_headers.extend(id_header(request.scope[CALLER]))
        return response

    def _query(self, request: HttpRequest) -> KVQuery:
        asked = request.query_params
        for name in asked:
            if name not in PARAMETERS:
                known = ", ".join(PARAMETERS)
                raise BadRequest(f"{name} is no parameter of this path: they are {known}", name)
        is_detailed = asked.get("detail", "0")
        if is_detailed not in ("0", "1"):
            raise BadRequest(f"{is_detailed!r}: 1 for single blocks, 0 for totals", "detail")
        is_filtered = not asked.keys().isdisjoint(("request", "prefix", "after"))
        query = make_query(
            limit=_limit(asked.get("limit")) if is_detailed == "1" or is_filtered else 0,
            prefix=asked.get("prefix", ""),
            after=asked.get("after"),
        )
        of_request = asked.get("request")
        return replace(
            query,
            worker_id=WorkerId(asked["worker"]) if "worker" in asked else None,
            request_ids=self._ids_of(of_request) if of_request is not None else (),
        )


def make_query(*, limit: int, prefix: str, after: str | None) -> KVQuery:
    """Return what is asked for. Raises: `BadRequest` for a prefix or a cursor that is none."""
    digits = prefix.lower()
    if digits and not _DIGITS.fullmatch(digits):
        raise BadRequest(f"{prefix!r}: up to 32 hexadecimal digits of a block's name", "prefix")
    cursor = _CURSOR.fullmatch(after) if after else None
    if after and cursor is None:
        raise BadRequest(f"{after!r} is not the `next` of a page", "after")
    return KVQuery(
        limit=limit,
        first=WorkerId(cursor[1]) if cursor else None,
        start=(int(cursor[2]), int(cursor[3])) if cursor else (0, 0),
        name=digits,
    )


def _limit(text: str | None) -> int:
    if text is None:
        return ENTRIES_DEFAULT
    if not text.isdecimal() or not 1 <= int(text) <= ENTRIES_MAX:
        raise BadRequest(f"{text!r}: a number from 1 to {ENTRIES_MAX}", "limit")
    return int(text)


def view(survey: KVSurvey) -> KVResidencyView:
    """Return a survey as it is shown."""
    following = None
    if survey.next is not None:
        worker, (section, index) = survey.next
        following = f"{worker}:{section}:{index}"
    return KVResidencyView(
        workers=[_view_worker(answer) for answer in survey.answers],
        silent=[*survey.silent],
        blocks=[
            _view_block(owner, block)
            for owner, blocks in zip(survey.owners, survey.blocks, strict=True)
            for block in blocks
        ],
        next=following,
    )


def _view_worker(answer: Surveyed) -> KVWorkerView:
    return KVWorkerView(
        id=answer.worker_id,
        epoch=answer.epoch,
        pools=[_view_pool(pool) for pool in answer.pools],
        tiers=[_view_tier(tier) for tier in answer.tiers],
        onboards=answer.num_onboards,
    )


def _view_pool(pool: PoolResidency) -> PoolView:
    return PoolView(
        window=pool.window,
        blocks=pool.num_blocks,
        free=pool.num_free,
        active=pool.num_active,
        cached=pool.num_cached,
        longest_free_run=pool.longest_run,
        block_bytes=pool.block_bytes,
        codec=pool.codec,
        retained=pool.num_retained,
    )


def _view_tier(tier: TierResidency) -> TierView:
    load = tier.load
    return TierView(
        name=load.name,
        slots=load.num_slots,
        used=load.num_used,
        codec=tier.codec,
        slot_bytes=tier.slot_bytes,
        arriving=tier.num_arriving,
        reading=tier.num_reading,
        hits=load.num_hits,
        bytes_in=load.bytes_in,
        bytes_out=load.bytes_out,
        corrupt=load.num_corrupt,
        failed=load.num_failed,
        evicted=load.num_evicted,
        exposed_ns=load.exposed_ns,
        decode_ns=tier.decode_ns,
        raw_bytes_in=load.raw_bytes_in,
        raw_bytes_out=load.raw_bytes_out,
        codec_encode_ns=load.encode_ns,
        codec_decode_ns=load.decode_ns,
        codec_exposed_ns=load.exposed_decode_ns,
    )


def _view_block(owner: WorkerId, block: PlacedBlock) -> BlockView:
    return BlockView(
        worker=owner,
        place=block.place,
        group=block.group,
        index=block.index,
        state=block.state,
        name=block.name.hex() if block.name is not None else None,
        codec=block.codec,
        temperature=block.temperature,
        bytes=block.num_bytes,
        holders=block.num_holders,
        in_flight=block.in_flight,
        idle_s=None if block.idle_ns is None else round(block.idle_ns / NS_PER_S, 3),
        retained_s=round(block.retained_ns / NS_PER_S, 3),
        decode_us=block.decode_ns / 1000,
    )
