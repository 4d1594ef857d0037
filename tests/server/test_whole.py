"""Whole responses: the answer, the client that leaves, the failure."""

import asyncio

import pytest

from penstock.core.errors import PeerLost
from penstock.server.generation import Generation
from penstock.server.metrics import Metrics
from penstock.server.whole import respond_whole
from tests.server.asking import query_of
from tests.server.double import ScriptedService, byte_model, text_script


class Client:
    """Both ends of an ASGI call."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict] = []

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)


def _respond(service: ScriptedService, client: Client, n: int = 1):
    generation = Generation(service, query_of(n=n), byte_model(), Metrics("tiny", service.status))
    return respond_whole(
        generation, lambda texts: "|".join(texts).encode(), client.receive, client.send, []
    )


def test_texts_come_in_order_of_choices():
    async def story():
        service, client = ScriptedService(lambda r: [65 + r.params.seed] * 3), Client()
        await _respond(service, client, n=3)
        start, body = client.sent
        assert (start["status"], body["body"]) == (200, b"AAA|BBB|CCC")
        assert (b"content-length", b"11") in start["headers"]

    asyncio.run(story())


def test_a_client_that_leaves_cancels_within_a_step():
    async def story():
        service, client = ScriptedService(text_script("x" * 90)), Client()
        task = asyncio.create_task(_respond(service, client, n=2))
        while service.num_live < 2:
            await asyncio.sleep(0)
        client.gone.set()
        await task
        assert service.num_live == 0
        assert max(service.made.values()) < 10
        assert client.sent == []

    asyncio.run(story())


def test_a_failure_is_raised_before_anything_is_sent():
    async def story():
        service, client = ScriptedService(text_script("x" * 90)), Client()
        service.failure_after = 3
        with pytest.raises(PeerLost, match="the worker is gone"):
            await _respond(service, client)
        assert client.sent == []

    asyncio.run(story())


def test_a_cancelled_task_leaves_nothing_running():
    async def story():
        service, client = ScriptedService(text_script("x" * 90)), Client()
        task = asyncio.create_task(_respond(service, client))
        while not service.num_live:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.num_live == 0
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(story())
