"""Streams: order of events, slow readers, clients that leave, failures under way."""

import asyncio
import json
import logging

import pytest

from penstock.core.errors import PeerLost
from penstock.server.generation import Generation
from penstock.server.metrics import Metrics
from penstock.server.openai import CHAT, ChunkWriter
from penstock.server.settings import ServerSettings
from penstock.server.stream import EventStream
from tests.server.asking import query_of
from tests.server.double import ScriptedService, byte_model, text_script


class Client:
    """Both ends of an ASGI call; `reads` is cleared while the client takes nothing."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.sent: list[dict] = []

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.reads.wait()
        self.sent.append(message)

    @property
    def events(self) -> list:
        data = b"".join(message.get("body", b"") for message in self.sent).decode()
        lines = [e.removeprefix("data: ") for e in data.split("\n\n") if e]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Streaming:
    """A stream that runs as a task."""

    def __init__(self, service: ScriptedService, settings=None, **query) -> None:
        self.client = Client()
        settings = settings or ServerSettings()
        query, model = query_of(**query), byte_model()
        self.generation = Generation(service, query, model, Metrics("tiny", service.status))
        writer = ChunkWriter(CHAT.chunks, query, 0, model.tokenizer)
        stream = EventStream(self.generation, writer, settings)
        self.task = asyncio.create_task(stream.run(self.client.receive, self.client.send, []))


def _deltas(events: list, index: int = 0) -> list:
    chunks = [e["choices"][0] for e in events if e != "[DONE]" and e.get("choices")]
    return [c["delta"] for c in chunks if c["index"] == index]


def test_events_come_in_the_order_of_the_api():
    async def story():
        streaming = Streaming(ScriptedService(text_script("abc")), has_usage=True)
        await streaming.task
        events = streaming.client.events
        assert _deltas(events) == [
            {"role": "assistant", "content": ""},
            {"content": "a"},
            {"content": "b"},
            {"content": "c"},
            {},
        ]
        *chunks, total, done = events
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["stop"]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert (total["choices"], total["usage"]["completion_tokens"]) == ([], 4)
        assert done == "[DONE]"
        assert [m["more_body"] for m in streaming.client.sent[1:]][-1] is False

    asyncio.run(story())


def test_each_choice_ends_when_it_ends():
    async def story():
        service = ScriptedService(lambda r: [97] * (2 + 6 * r.params.seed))
        streaming = Streaming(service, n=2)
        await streaming.task
        reasons = [
            (e["choices"][0]["index"], e["choices"][0]["finish_reason"])
            for e in streaming.client.events
            if e != "[DONE]"
        ]
        first_end = reasons.index((0, "stop"))
        assert (1, None) in reasons[first_end:]
        assert reasons[-1] == (1, "stop")

    asyncio.run(story())


def test_one_send_carries_all_that_has_gathered():
    async def story():
        streaming = Streaming(ScriptedService(text_script("x" * 50)))
        streaming.client.reads.clear()
        while streaming.generation.choices[0].num_tokens < 40:
            await asyncio.sleep(0)
        streaming.client.reads.set()
        await streaming.task
        assert len(_deltas(streaming.client.events)) == 52
        assert len(streaming.client.sent) < 30

    asyncio.run(story())


def test_a_client_that_leaves_cancels_within_a_step():
    async def story():
        service = ScriptedService(text_script("x" * 90))
        streaming = Streaming(service, n=2)
        while len(streaming.client.sent) < 4:
            await asyncio.sleep(0)
        made = max(service.made.values())
        streaming.client.gone.set()
        await streaming.task
        assert service.num_live == 0
        assert max(service.made.values()) <= made + 3
        assert streaming.client.events[-1] != "[DONE]"

    asyncio.run(story())


def test_a_client_that_leaves_before_the_first_token_gets_nothing():
    async def story():
        service = ScriptedService(text_script("x" * 90))
        streaming = Streaming(service)
        streaming.client.gone.set()
        await streaming.task
        assert service.num_live == 0

    asyncio.run(story())


def test_a_slow_reader_is_given_up_when_it_is_too_far_behind(caplog):
    async def story():
        service = ScriptedService(text_script("x" * 99))
        streaming = Streaming(service, ServerSettings(stream_buffer_bytes=4000))
        streaming.client.reads.clear()
        await asyncio.wait_for(streaming.task, 5)
        assert service.num_live == 0
        assert service.cancelled == ["cmpl-q-0"]
        assert 10 < service.made["cmpl-q-0"] < 60, "about 4000 bytes of events"
        assert not streaming.task.cancelled()

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    assert "bytes behind: gave it up" in caplog.text


def test_a_reader_that_stands_still_is_given_up(caplog):
    async def story():
        service = ScriptedService(text_script("abc"))
        streaming = Streaming(service, ServerSettings(stall_timeout_s=0.05))
        streaming.client.reads.clear()
        await asyncio.wait_for(streaming.task, 5)
        assert streaming.generation.has_ended
        assert streaming.client.sent == []

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    assert "has read nothing for" in caplog.text


def test_a_model_that_takes_its_time_is_no_fault_of_the_reader(caplog):
    async def story():
        service = ScriptedService(text_script("abc"))
        service.submit, submit = lambda request, sink: later.append((request, sink)), service.submit
        later = []
        streaming = Streaming(service, ServerSettings(stall_timeout_s=0.02))
        await asyncio.sleep(0.1)
        submit(*later[0])
        await streaming.task
        assert streaming.client.events[-1] == "[DONE]"

    asyncio.run(story())
    assert not caplog.text


def test_a_slow_but_steady_reader_gets_everything():
    async def story():
        service = ScriptedService(text_script("x" * 30))
        streaming = Streaming(service, ServerSettings(stall_timeout_s=0.2))
        client = streaming.client
        while not streaming.task.done():
            client.reads.clear()
            await asyncio.sleep(0.01)
            client.reads.set()
            await asyncio.sleep(0)
        await streaming.task
        assert client.events[-1] == "[DONE]"
        assert len(_deltas(client.events)) == 32

    asyncio.run(story())


def test_a_failure_before_the_first_token_is_raised():
    async def story():
        service = ScriptedService(text_script("abc"))
        service.failure_after = 0
        streaming = Streaming(service)
        with pytest.raises(PeerLost):
            await streaming.task
        assert streaming.client.sent == []

    asyncio.run(story())


def test_a_failure_under_way_is_an_error_event():
    async def story():
        service = ScriptedService(text_script("abcdef"))
        service.failure_after = 3
        streaming = Streaming(service)
        await streaming.task
        *chunks, error, done = streaming.client.events
        assert "".join(d.get("content", "") for d in _deltas(chunks)) == "abc"
        assert error["error"]["code"] == "worker_lost"
        assert error["error"]["message"] == "the worker is gone"
        assert done == "[DONE]"

    asyncio.run(story())


def test_a_cancelled_server_cancels_the_request():
    async def story():
        service = ScriptedService(text_script("x" * 90))
        streaming = Streaming(service)
        while not streaming.client.sent:
            await asyncio.sleep(0)
        streaming.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await streaming.task
        assert service.num_live == 0

    asyncio.run(story())
