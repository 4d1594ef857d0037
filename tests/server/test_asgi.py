"""Bodies, bells and whole responses."""

import asyncio

import pytest

from penstock.core.errors import BadRequest
from penstock.server.asgi import Doorbell, read_body, respond, watch
from penstock.server.errors import BodyTooLarge, BodyTooSlow


def _receiver(*messages: dict):
    waiting = list(messages)

    async def receive():
        if waiting:
            return waiting.pop(0)
        await asyncio.Event().wait()
        return None

    return receive


def _part(body: bytes, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


def _read(*messages: dict, headers=(), limit: int = 5, timeout_s: float = 5.0) -> bytes:
    scope = {"headers": list(headers)}
    return asyncio.run(read_body(scope, _receiver(*messages), limit, timeout_s))


def test_bodies_are_joined():
    assert _read(_part(b"ab", True), _part(b"c", True), _part(b"de")) == b"abcde"
    assert _read(_part(b"")) == b""


def test_a_large_body_is_refused_before_it_is_read():
    with pytest.raises(BodyTooLarge):
        _read(headers=[(b"content-length", b"6")])


def test_a_large_body_without_a_length_is_refused_while_it_is_read():
    with pytest.raises(BodyTooLarge):
        _read(_part(b"abc", True), _part(b"def", True))


def test_a_slow_body_is_refused():
    with pytest.raises(BodyTooSlow):
        _read(_part(b"abc", True), timeout_s=0.01)


def test_a_client_that_leaves_in_the_middle():
    with pytest.raises(BadRequest, match="went away"):
        _read(_part(b"abc", True), {"type": "http.disconnect"})


def test_a_bell_wakes_the_waiter_once():
    async def story():
        bell = Doorbell()
        bell.ring()
        bell.ring()
        await bell.wait()
        waiter = asyncio.create_task(bell.wait())
        await asyncio.sleep(0)
        assert not waiter.done()
        bell.ring()
        bell.ring()
        await waiter
        waiter = asyncio.create_task(bell.wait())
        await asyncio.sleep(0)
        assert not waiter.done(), "two rings in one turn are one"
        waiter.cancel()

    asyncio.run(story())


def test_watching_ends_with_the_client():
    async def story():
        calls = []
        await watch(
            _receiver(_part(b""), {"type": "http.disconnect"}), lambda: calls.append("gone")
        )
        assert calls == ["gone"]

    asyncio.run(story())


def test_a_whole_response_has_its_length():
    async def story():
        sent = []

        async def send(message):
            sent.append(message)

        await respond(send, 418, b"abc", [(b"x-a", b"b")])
        assert sent[0]["status"] == 418
        assert dict(sent[0]["headers"])[b"content-length"] == b"3"
        assert dict(sent[0]["headers"])[b"x-a"] == b"b"
        assert sent[1] == {"type": "http.response.body", "body": b"abc"}

    asyncio.run(story())
