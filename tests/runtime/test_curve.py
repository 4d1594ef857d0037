"""Messages between hosts: who may speak, who may listen, and what a stranger gets."""

import asyncio
import secrets
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from penstock.core.messages import Cancel, Message
from penstock.core.types import CONTROLLER, RequestId, WorkerId
from penstock.runtime.curve import CurveKeys
from penstock.runtime.messaging import Messenger, Network

KEYS = CurveKeys.derive(b"the key of the cluster".ljust(32))
OTHER = CurveKeys.derive(b"the key of another one".ljust(32))
A, B = WorkerId("a"), WorkerId("b")


class Node:
    """A messenger with a folder of its own, as on a host of its own, and what it heard."""

    def __init__(self, name: WorkerId, keys: CurveKeys = KEYS, *, port: int = 0, **options) -> None:
        self.heard: list[Message] = []
        self.folder = tempfile.TemporaryDirectory(prefix="pt-")
        self.messenger = Messenger(
            name,
            1,
            Path(self.folder.name),
            self.heard.append,
            network=Network(keys, "127.0.0.1", port),
            **options,
        )
        self.messenger.open()

    def call(self, other: "Node") -> None:
        them = other.messenger
        address = self.messenger.route(them.address, them.remote_address)
        assert address == them.remote_address
        self.messenger.connect(them.name, them.epoch, address)

    def say(self, number: int, to: WorkerId) -> None:
        self.messenger.send(to, Cancel(request_id=RequestId(str(number))))

    def close(self) -> None:
        self.messenger.close()
        self.folder.cleanup()


async def until(condition, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def test_the_keys_are_a_function_of_the_cluster_key():
    assert CurveKeys.derive(b"the key of the cluster".ljust(32)) == KEYS
    pairs = (KEYS.listener_public, KEYS.listener_secret, KEYS.caller_public, KEYS.caller_secret)
    assert len(set(pairs)) == 4
    assert zmq.curve_public(KEYS.caller_secret) == KEYS.caller_public


def test_messages_cross_in_order_between_hosts():
    async def run() -> None:
        a, b = Node(A), Node(B)
        a.call(b)
        b.call(a)
        try:
            for number in range(500):
                a.say(number, B)
                b.say(-number, A)
            await until(lambda: len(a.heard) == len(b.heard) == 500)
            assert [int(m.request_id) for m in b.heard] == list(range(500))
        finally:
            a.close()
            b.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "caller",
    [
        OTHER,
        replace(KEYS, caller_public=OTHER.caller_public, caller_secret=OTHER.caller_secret),
        replace(KEYS, listener_public=OTHER.listener_public),
    ],
    ids=["another cluster", "only what listeners say", "a listener in disguise"],
)
def test_who_does_not_have_the_key_is_not_heard(caller: CurveKeys):
    async def run() -> None:
        a, b, stranger = Node(A), Node(B, hears_strangers=True), Node(WorkerId("s"), caller)
        a.call(b)
        stranger.call(b)
        try:
            stranger.say(666, B)
            a.say(1, B)
            await until(lambda: b.heard)
            await asyncio.sleep(0.2)
            assert [int(m.request_id) for m in b.heard] == [1]
        finally:
            for node in (a, b, stranger):
                node.close()

    asyncio.run(run())


def test_without_the_callers_secret_the_gatekeeper_refuses_and_says_so_once(caplog):
    async def run() -> None:
        half = replace(KEYS, caller_public=OTHER.caller_public, caller_secret=OTHER.caller_secret)
        b, strangers = Node(B), [Node(WorkerId(f"s{n}"), half) for n in range(3)]
        try:
            for stranger in strangers:
                stranger.call(b)
            await until(lambda: b.messenger._gatekeeper.num_refused == 3)
        finally:
            for node in (b, *strangers):
                node.close()

    asyncio.run(run())
    assert sum("has another key" in line for line in caplog.messages) == 1


def test_junk_on_the_port_changes_nothing():
    async def run() -> None:
        a, b = Node(A), Node(B, hears_strangers=True)
        a.call(b)
        port = int(b.messenger.remote_address.rpartition(":")[2])
        try:
            for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03", b"\0" * 100):
                for tail in (b"", secrets.token_bytes(5000)):
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(junk + tail)
            a.say(1, B)
            await until(lambda: b.heard)
            assert len(b.heard) == 1
        finally:
            a.close()
            b.close()

    asyncio.run(run())


@pytest.mark.parametrize(("sender", "is_reopened"), [(A, True), (CONTROLLER, False)])
def test_a_cut_link_is_opened_anew_between_workers_alone(sender: WorkerId, is_reopened: bool):
    async def run() -> None:
        a, b = Node(sender), Node(B, hears_strangers=True)
        a.call(b)
        try:
            a.say(1, B)
            await until(lambda: b.heard)
            port = int(b.messenger.remote_address.rpartition(":")[2])
            b.close()
            b = Node(B, hears_strangers=True, port=port)  # stands for the same, behind a new link
            number = 2
            while number < 12 or (is_reopened and not b.heard):  # how soon is for the kernel to say
                a.say(number, B)
                number += 1
                await asyncio.sleep(0.05)
            assert bool(b.heard) == is_reopened
            if is_reopened:
                await until(lambda: int(b.heard[-1].request_id) == number - 1)
        finally:
            a.close()
            b.close()

    asyncio.run(run())


def test_an_address_that_is_none_is_nobody():
    async def run() -> None:
        a = Node(A)
        try:
            for number, address in enumerate(("tcp://nowhere", "tcp://127.0.0.1:0", "junk", "")):
                peer = WorkerId(f"p{number}")
                a.messenger.connect(peer, 1, address)
                a.say(1, peer)
        finally:
            a.close()

    asyncio.run(run())
