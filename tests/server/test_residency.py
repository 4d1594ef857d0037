"""Where blocks are, over HTTP: what may be asked, and how it is answered."""

import asyncio

import httpx
import pytest

from penstock.core.errors import UnknownRequest
from penstock.core.residency import (
    KVQuery,
    KVSurvey,
    PlacedBlock,
    PoolResidency,
    Surveyed,
    TierResidency,
)
from penstock.core.tiers import TierLoad
from penstock.core.types import BlockHash, RequestId, WorkerId
from penstock.server.app import create_app
from penstock.server.settings import ServerSettings
from tests.server.double import ScriptedService, byte_model, client, text_script

NAME = BlockHash(bytes(range(16)))
SURVEY = KVSurvey(
    answers=(
        Surveyed(
            number=1,
            worker_id=WorkerId("d0"),
            epoch=3,
            pools=(PoolResidency(0, 8, 3, 2, 3, 2, 4096, "raw", 1),),
            tiers=(TierResidency(TierLoad("dram", 4, 1, num_hits=9), "int8", 2048, 1, 2),),
        ),
    ),
    silent=(WorkerId("d1"),),
    owners=(WorkerId("d0"),),
    blocks=((PlacedBlock("dram", 0, 5, "present", NAME, "int8", "warm", 2048, 0, "", 2 * 10**9),),),
    next=(WorkerId("d0"), (1, 6)),
)


class Directory:
    def __init__(self) -> None:
        self.asked: list[KVQuery] = []

    async def survey(self, query: KVQuery) -> KVSurvey:
        self.asked.append(query)
        if "gone" in query.request_ids:
            raise UnknownRequest("gone is not under way", "request")
        return SURVEY


def ask(path: str, directory: Directory | None) -> httpx.Response:
    async def story() -> httpx.Response:
        service = ScriptedService(text_script("x"))
        app = create_app(service, byte_model(), ServerSettings(), None, directory)
        async with client(app) as http:
            return await http.get(path)

    return asyncio.run(story())


def test_totals_blocks_and_who_was_silent():
    directory = Directory()
    shown = ask("/kv/residency", directory).json()
    assert directory.asked == [KVQuery()]
    (worker,) = shown["workers"]
    assert worker["pools"][0]["longest_free_run"] == 2
    assert (worker["tiers"][0]["codec"], worker["tiers"][0]["hits"]) == ("int8", 9)
    assert shown["silent"] == ["d1"]
    (block,) = shown["blocks"]
    assert (block["worker"], block["place"], block["name"]) == ("d0", "dram", NAME.hex())
    assert block["idle_s"] == 2.0
    assert shown["next"] == "d0:1:6"


def test_the_next_page_is_asked_for_as_the_answer_says():
    directory = Directory()
    ask("/kv/residency?detail=1&limit=7&after=d0:1:6&worker=d0&prefix=00FF", directory)
    assert directory.asked == [
        KVQuery(limit=7, first=WorkerId("d0"), start=(1, 6), worker_id=WorkerId("d0"), name="00ff")
    ]


def test_a_filter_alone_asks_for_blocks():
    directory = Directory()
    ask("/kv/residency?request=mine", directory)
    assert directory.asked == [KVQuery(limit=100, request_ids=(RequestId("mine"),))]
    assert ask("/kv/residency?request=gone", directory).status_code == 404


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ("detail=yes", "detail"),
        ("limit=0&detail=1", "limit"),
        ("limit=1001&detail=1", "limit"),
        ("prefix=xyz", "prefix"),
        ("after=here", "after"),
        ("blocks=1", "blocks"),
    ],
)
def test_what_is_none_of_its_parameters_is_refused_by_name(asked: str, field: str):
    directory = Directory()
    answer = ask(f"/kv/residency?{asked}", directory)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert directory.asked == []


def test_a_server_that_cannot_look_says_so():
    assert ask("/kv/residency", None).status_code == 501
