"""Questions to several workers: pages over all of them, and those that say nothing."""

import asyncio

from penstock.core.messages import Message
from penstock.core.residency import KVQuery, KVSurvey, Place, PlacedBlock, Survey, Surveyed
from penstock.core.types import RequestId, WorkerId
from penstock.runtime.surveys import Surveys

NAMES = [WorkerId(name) for name in "abc"]


def block(index: int) -> PlacedBlock:
    return PlacedBlock("device", 0, index, "cached", None, "raw", "hot", 1, 0)


class Workers:
    """Each has so many blocks, and answers on the next turn unless it is silent."""

    def __init__(self, counts: dict[WorkerId, int], silent: str = "") -> None:
        self.counts = counts
        self.silent = {WorkerId(name) for name in silent}
        self.asked: list[tuple[WorkerId, Survey]] = []
        self.surveys = Surveys(self.hear, timeout_s=0.05)

    def hear(self, to: WorkerId, message: Message) -> None:
        assert isinstance(message, Survey)
        self.asked.append((to, message))
        if to not in self.silent:
            asyncio.get_running_loop().call_soon(self.surveys.take, self.answer(to, message))

    def answer(self, worker: WorkerId, survey: Survey) -> Surveyed:
        first = survey.start[1]
        blocks = tuple(map(block, range(first, self.counts[worker])))[: survey.limit]
        end = first + len(blocks)
        is_all = end == self.counts[worker] or not survey.limit
        return Surveyed(
            number=survey.number,
            worker_id=worker,
            epoch=1,
            pools=(),
            tiers=(),
            blocks=blocks,
            next=None if is_all else (0, end),
        )

    def ask(self, **query: object) -> KVSurvey:
        async def story() -> KVSurvey:
            wire_ids = (RequestId("r~1"),)
            return await self.surveys.ask(NAMES, KVQuery(**query), wire_ids)  # type: ignore[arg-type]

        return asyncio.run(story())


def three(silent: str = "") -> Workers:
    return Workers(dict(zip(NAMES, (4, 0, 3), strict=True)), silent)


def test_totals_come_from_all_at_once():
    workers = three()
    survey = workers.ask()
    assert [answer.worker_id for answer in survey.answers] == NAMES
    assert (survey.blocks, survey.next, survey.silent) == ((), None, ())
    assert len(workers.asked) == 3


def test_pages_leave_nothing_out_and_no_answer_is_larger_than_its_page():
    workers = three()
    found: list[tuple[WorkerId, int]] = []
    first: WorkerId | None = None
    start: Place = (0, 0)
    for _ in range(10):
        survey = workers.ask(limit=2, first=first, start=start, name="a0")
        page = [
            (owner, one.index)
            for owner, blocks in zip(survey.owners, survey.blocks, strict=True)
            for one in blocks
        ]
        assert len(page) <= 2
        found += page
        if survey.next is None:
            break
        first, start = survey.next
    assert found == [(NAMES[0], i) for i in range(4)] + [(NAMES[2], i) for i in range(3)]
    wanted = [survey for _, survey in workers.asked if survey.limit]
    assert {(survey.name, survey.request_ids) for survey in wanted} == {("a0", ("r~1",))}


def test_who_says_nothing_is_named_and_the_others_are_heard():
    survey = three(silent="a").ask(limit=10)
    assert survey.silent == (NAMES[0],)
    assert [answer.worker_id for answer in survey.answers] == NAMES[1:]
    assert survey.owners == (NAMES[2],)


def test_an_answer_that_is_late_or_said_twice_changes_nothing():
    workers = three()

    async def story() -> None:
        first = await workers.surveys.ask(NAMES, KVQuery())
        workers.surveys.take(first.answers[0])
        again = await workers.surveys.ask(NAMES, KVQuery())
        assert [answer.worker_id for answer in again.answers] == NAMES
        assert {answer.number for answer in again.answers} == {2}

    asyncio.run(story())
