"""The requests behind a response: submission, sinks, cancellation, the books."""

import asyncio

import pytest

from penstock.core.errors import CapacityExceeded, PeerLost, PromptTooLong, WorkersUnavailable
from penstock.core.messages import RequestFailed, TokenOutput
from penstock.core.types import FinishReason
from penstock.server.generation import Generation
from penstock.server.metrics import Metrics
from tests.server.asking import query_of
from tests.server.double import ScriptedService, byte_model, text_script


class Listening:
    """A generation with everything it says."""

    def __init__(self, service: ScriptedService, query) -> None:
        self.texts: dict[int, str] = {}
        self.ended = asyncio.Event()
        self.num_ends = 0
        self.metrics = Metrics("tiny", service.status)
        self.generation = Generation(service, query, byte_model(), self.metrics)
        self.generation.start(self._take, self._end)

    def _take(self, choice, text):
        self.texts[choice.index] = self.texts.get(choice.index, "") + text

    def _end(self):
        self.num_ends += 1
        self.ended.set()


def test_every_choice_is_submitted_and_heard():
    async def story():
        service = ScriptedService(lambda r: list(f"seed {r.params.seed}".encode()))
        listening = Listening(service, query_of(n=3))
        await listening.ended.wait()
        assert listening.texts == {0: "seed 0", 1: "seed 1", 2: "seed 2"}
        assert listening.num_ends == 1
        assert [choice.finish_reason for choice in listening.generation.choices] == ["stop"] * 3

    asyncio.run(story())


def test_a_stop_string_cancels_at_the_service():
    async def story():
        service = ScriptedService(text_script("abcENDdef"))
        listening = Listening(service, query_of(params={"stop": ("END",)}))
        await listening.ended.wait()
        assert listening.texts == {0: "abc"}
        await asyncio.sleep(0)
        assert service.cancelled == ["cmpl-q-0"]
        assert service.made["cmpl-q-0"] <= 7, "within a step"

    asyncio.run(story())


def test_cancel_stops_all_that_is_open():
    async def story():
        service = ScriptedService(text_script("x" * 90))
        listening = Listening(service, query_of(n=2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        listening.generation.cancel()
        before = dict(listening.texts)
        assert service.cancelled == ["cmpl-q-0", "cmpl-q-1"]
        for _ in range(5):
            await asyncio.sleep(0)
        assert listening.texts == before
        assert {c.finish_reason for c in listening.generation.choices} == {"abort"}

    asyncio.run(story())


def test_a_refusal_in_the_middle_leaves_nothing_behind():
    async def story():
        service = ScriptedService(text_script("x" * 90))
        submit = service.submit

        def refuse_the_third(request, sink):
            if request.request_id == "cmpl-q-2":
                raise CapacityExceeded("full", 2.0)
            submit(request, sink)

        service.submit = refuse_the_third
        with pytest.raises(CapacityExceeded):
            Listening(service, query_of(n=3))
        assert service.num_live == 0
        assert service.cancelled == ["cmpl-q-0", "cmpl-q-1"]

    asyncio.run(story())


@pytest.mark.parametrize(("query_id", "field"), [("chatcmpl-q", "messages"), ("cmpl-q", "prompt")])
def test_a_prompt_too_long_for_the_cluster_names_the_clients_field(query_id, field):
    async def story():
        service = ScriptedService(text_script("x"))
        service.refusal = PromptTooLong("does not fit", "anything")
        with pytest.raises(PromptTooLong) as refused:
            Listening(service, query_of(query_id=query_id))
        assert refused.value.field == field

    asyncio.run(story())


def test_what_is_given_up_for_want_of_room_says_when_to_come_back():
    async def story():
        service = ScriptedService(text_script("x"))
        sinks = []
        service.submit = lambda request, sink: sinks.append(sink)
        listening = Listening(service, query_of())
        gone = RequestFailed(request_id="cmpl-q", reason="given up", retry_after_s=1.5)
        sinks[0](gone)
        failure = listening.generation.failure
        assert isinstance(failure, CapacityExceeded)
        assert failure.retry_after_s == 1.5

    asyncio.run(story())


@pytest.mark.parametrize(("retryable", "error"), [(False, PeerLost), (True, WorkersUnavailable)])
def test_a_failure_ends_every_choice(retryable, error):
    async def story():
        service = ScriptedService(text_script("x" * 90))
        sinks = []
        submit = service.submit

        def keep(request, sink):
            sinks.append(sink)
            submit(request, sink)

        service.submit = keep
        listening = Listening(service, query_of(n=2))
        sinks[0](RequestFailed(request_id="cmpl-q-0", reason="gone", is_retryable=retryable))
        assert isinstance(listening.generation.failure, error)
        assert listening.generation.has_ended
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert service.num_live == 0
        assert (listening.num_ends, listening.texts) == (1, {})

    asyncio.run(story())


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_an_end_that_is_no_answer_is_a_failure(reason):
    async def story():
        service = ScriptedService(text_script("x"))
        service.submit = lambda request, sink: sink(
            TokenOutput(request.request_id, (1,), finish_reason=reason)
        )
        listening = Listening(service, query_of())
        assert isinstance(listening.generation.failure, WorkersUnavailable)
        assert listening.ended.is_set(), "a sink may be called at once"

    asyncio.run(story())
