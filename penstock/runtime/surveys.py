"""`Surveys`: questions to all workers, and their answers as they come, until a deadline.

A worker that does not answer in time is named, and what the others said is kept. Owns how a
page of blocks is put together from several workers; what is asked and answered is
`core/residency.py`'s. Called by `LocalCluster`, on the loop's thread.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from penstock.control.controller import Controller
from penstock.core.errors import UnknownRequest
from penstock.core.messages import Message
from penstock.core.residency import KVQuery, KVSurvey, Place, PlacedBlock, Survey, Surveyed
from penstock.core.types import RequestId, WorkerId
from penstock.runtime.questions import Questions

TIMEOUT_S: Final = 2.0
ROUNDS_MAX: Final = 16
"""Questions for one page: an answer looks at so many blocks at most, and finds few of them."""


@dataclass(slots=True)
class _Page:
    """Blocks found so far, how many more are wanted, and where to go on."""

    places: list[tuple[WorkerId, Place]]
    limit: int
    owners: list[WorkerId] = field(default_factory=list)
    blocks: list[tuple[PlacedBlock, ...]] = field(default_factory=list)
    silent: set[WorkerId] = field(default_factory=set)

    def take(self, worker: WorkerId, answer: Surveyed | None) -> None:
        """Take what a worker has found, None if it said nothing."""
        if answer is None:
            self.silent.add(worker)
            return
        if answer.blocks:
            self.owners.append(worker)
            self.blocks.append(answer.blocks)
            self.limit -= len(answer.blocks)
        if answer.next is not None:
            self.places.insert(0, (worker, answer.next))


class Surveys:
    """`send` is how a worker is told something."""

    def __init__(
        self, send: Callable[[WorkerId, Message], None], timeout_s: float = TIMEOUT_S
    ) -> None:
        self._timeout_s = timeout_s
        self._questions = Questions[Surveyed](send)

    def take(self, answer: Surveyed) -> None:
        """Take an answer; one that comes too late is of no use any more."""
        self._questions.take(answer.number, answer.worker_id, answer)

    async def survey(self, controller: Controller, query: KVQuery) -> KVSurvey:
        """Ask the workers that are up, in the order of their names; requests have other ids there.

        Raises: `UnknownRequest` when none of the requests is live.
        """
        records = [controller.requests[r] for r in query.request_ids if r in controller.requests]
        if query.request_ids and not records:
            raise UnknownRequest(
                f"{query.request_ids[0]} is not under way: what it left is cached under the names "
                "of its blocks",
                "request",
            )
        wire_ids = tuple(record.wire_id for record in records)
        # By name: who came when is chance, and a page begins where the one before it ended.
        everybody = sorted(controller.workers)
        wanted = everybody if query.worker_id is None else [query.worker_id]
        return await self.ask(wanted, query, wire_ids)

    async def ask(
        self, order: Sequence[WorkerId], query: KVQuery, wire_ids: tuple[RequestId, ...] = ()
    ) -> KVSurvey:
        """Ask these workers, in this order."""
        answers = await self._ask(order, Survey(number=0))
        begin = order.index(query.first) if query.first in order else 0
        places = [
            (worker, query.start if worker == query.first else (0, 0))
            for worker in order[begin:]
            if worker in answers
        ]
        page = _Page(places if query.limit else [], query.limit)
        await self._fill(page, Survey(number=0, request_ids=wire_ids, name=query.name))
        return KVSurvey(
            answers=tuple(answers[worker] for worker in order if worker in answers),
            silent=tuple(w for w in order if w not in answers or w in page.silent),
            owners=tuple(page.owners),
            blocks=tuple(page.blocks),
            next=page.places[0] if page.places else None,
        )

    async def _fill(self, page: _Page, wanted: Survey) -> None:
        """Ask one worker after the other for blocks until the page is full."""
        for _ in range(ROUNDS_MAX):
            if not page.places or not page.limit:
                return
            worker, start = page.places.pop(0)
            asked = replace(wanted, limit=page.limit, start=start)
            page.take(worker, (await self._ask([worker], asked)).get(worker))

    async def _ask(self, workers: Iterable[WorkerId], survey: Survey) -> dict[WorkerId, Surveyed]:
        """Return the answers that came in time."""
        return await self._questions.ask(
            workers, lambda number: replace(survey, number=number), self._timeout_s
        )
