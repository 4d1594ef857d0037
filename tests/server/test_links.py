"""Links of a running cluster over HTTP: what may be asked, and how it is answered."""

import asyncio

import httpx
import pytest

from penstock.core.errors import UnknownWorker
from penstock.core.links import MOVED_BYTES, MOVED_BYTES_MAX, Link, LinksTried, WayTried
from penstock.core.types import WorkerId
from penstock.server.app import create_app
from penstock.server.settings import ServerSettings
from tests.server.double import ScriptedService, byte_model, client, text_script

TRIED = LinksTried(
    number=1,
    worker_id=WorkerId("d0"),
    fingerprint="aa",
    links=(
        Link(
            owner=WorkerId("p0"),
            fingerprint="bb",
            skew_ns=-2_000,
            skew_within_ns=50_000,
            ways=(
                WayTried(
                    kind="shm",
                    name="shm",
                    is_used=True,
                    opening_ns=300_000,
                    num_bytes=64,
                    bytes_per_s=9e9,
                    limit="a copy in one process",
                    limit_bytes_per_s=10e9,
                ),
                WayTried(kind="tcp", refusal="p0 does not serve it"),
            ),
        ),
    ),
)


class Links:
    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    async def try_links(self, worker_id: WorkerId, moved_bytes: int) -> LinksTried:
        if worker_id == "nobody":
            raise UnknownWorker("there is no worker nobody", "worker")
        self.asked.append((worker_id, moved_bytes))
        return TRIED


def ask(worker: str, tester: Links | None, **body: object) -> httpx.Response:
    async def story() -> httpx.Response:
        service = ScriptedService(text_script("x"))
        app = create_app(service, byte_model(), ServerSettings(), None, None, tester)
        async with client(app) as http:
            return await http.post(f"/cluster/workers/{worker}/links", json=body)

    return asyncio.run(story())


def test_rates_shares_and_refusals():
    tester = Links()
    shown = ask("d0", tester).json()
    assert tester.asked == [("d0", MOVED_BYTES)]
    assert (shown["reader"], shown["fingerprint"]) == ("d0", "aa")
    (link,) = shown["links"]
    assert (link["owner"], link["fingerprint"], link["incompatibility"]) == ("p0", "bb", "")
    assert (link["clock_skew_s"], link["clock_skew_within_s"]) == (-2e-6, 50e-6)
    shm, tcp = link["ways"]
    assert (shm["used"], shm["share"], shm["opening_s"]) == (True, 0.9, 0.0003)
    assert (tcp["refusal"], tcp["share"]) == ("p0 does not serve it", 0.0)


def test_what_cannot_be_asked():
    tester = Links()
    assert ask("nobody", tester).status_code == 404
    assert ask("d0", None).status_code == 501
    for moved_bytes in (0, -1, MOVED_BYTES_MAX + 1):
        refused = ask("d0", tester, moved_bytes=moved_bytes)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "moved_bytes")
    assert ask("d0", tester, moved=1).status_code == 400
    assert tester.asked == []


@pytest.mark.parametrize("moved_bytes", [1, MOVED_BYTES_MAX])
def test_how_much_is_moved_may_be_said(moved_bytes: int):
    tester = Links()
    assert ask("d0", tester, moved_bytes=moved_bytes).status_code == 200
    assert tester.asked == [("d0", moved_bytes)]
