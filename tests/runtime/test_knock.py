"""Knocking at a cluster's door: what can be wrong, and what is said about it."""

import asyncio
import socket
import tempfile
import threading
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from penstock.core.errors import StartupFailed
from penstock.core.types import WorkerId
from penstock.runtime.curve import CurveKeys
from penstock.runtime.knock import knock
from penstock.runtime.messaging import Messenger, Network

KEYS = CurveKeys.derive(b"a key".ljust(32))


@asynccontextmanager
async def cluster():
    with tempfile.TemporaryDirectory(prefix="pt-") as folder:
        network = Network(KEYS, "127.0.0.1")
        messenger = Messenger(WorkerId("c"), 0, Path(folder), print, network=network)
        messenger.open()
        try:
            yield int(messenger.remote_address.rpartition(":")[2])
        finally:
            messenger.close()


def test_the_right_key_opens():
    async def run() -> None:
        async with cluster() as port:
            door = await knock("127.0.0.1", port, KEYS)
            assert (door.address, door.local_host) == (f"tcp://127.0.0.1:{port}", "127.0.0.1")

    asyncio.run(run())


def test_another_key_does_not_and_the_remedy_is_said():
    async def run() -> None:
        async with cluster() as port:
            with pytest.raises(StartupFailed, match="does not accept our cluster key: copy"):
                await knock("127.0.0.1", port, CurveKeys.derive(b"another".ljust(32)))

    asyncio.run(run())


def test_a_port_where_nobody_listens(free_port: int):
    with pytest.raises(StartupFailed, match=r"nothing listens .*penstock serve --listen"):
        asyncio.run(knock("127.0.0.1", free_port, KEYS))


def test_a_host_that_is_not_known():
    with pytest.raises(StartupFailed, match=r"no-such-host\.invalid is not known"):
        asyncio.run(knock("no-such-host.invalid", 7777, KEYS))


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100, None])
def test_something_else_listens_there(answer: bytes | None):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            for _ in range(2):  # it is reached first, and then asked
                stream = server.accept()[0]
                with stream, suppress(ConnectionError):
                    if answer is not None:
                        stream.sendall(answer)
                    while stream.recv(1000):
                        pass

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(StartupFailed, match="does not answer as a Penstock cluster"):
            asyncio.run(knock("127.0.0.1", server.getsockname()[1], KEYS, timeout_s=0.5))
        thread.join()
