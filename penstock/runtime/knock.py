"""`knock`: see whether a cluster answers at an address, and whether it takes our key, before
anything else is tried.

Every way in which that can fail has a word of its own, because each has another remedy. Leaves
nothing open. Called by whoever joins (`joined.py`).
"""

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from penstock.core.errors import StartupFailed
from penstock.runtime.curve import CurveKeys

KNOCK_TIMEOUT_S: Final = 5.0
_ENDS: Final[dict[zmq.Event, bool | None]] = {
    zmq.Event.HANDSHAKE_SUCCEEDED: True,
    zmq.Event.HANDSHAKE_FAILED_AUTH: False,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: False,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: False,
    zmq.Event.DISCONNECTED: None,
}


@dataclass(frozen=True, slots=True)
class Door:
    """Where a cluster takes part in, and the address of ours from which it was reached."""

    host: str
    port: int
    local_host: str

    @property
    def address(self) -> str:
        """The address as ZeroMQ takes it."""
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self}"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


async def knock(host: str, port: int, keys: CurveKeys, timeout_s: float = KNOCK_TIMEOUT_S) -> Door:
    """Reach the cluster at an address, prove both sides, and hang up.

    Raises: `StartupFailed` saying what to change: the address, the network or the key.
    """
    door = Door(host, port, await _reach(host, port, timeout_s))
    answer = await _shake_hands(door.address, keys, timeout_s)
    if answer is None:
        raise StartupFailed(
            f"something listens at {door} but does not answer as a Penstock cluster does: is that "
            "the port that `penstock serve --listen` was given?"
        )
    if not answer:
        raise StartupFailed(
            f"{door} does not accept our cluster key: copy the key file from the host of "
            "`penstock serve`, which says where it lies, and name it with --cluster-key-file (or "
            "set PENSTOCK_CLUSTER_KEY alike on both)"
        )
    return door


async def _reach(host: str, port: int, timeout_s: float) -> str:
    """Connect and hang up; return the address of ours that the call came from."""
    where = f"{host}:{port}"
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        raise StartupFailed(
            f"{where} does not answer within {timeout_s:.0f} s: is the address right, and does a "
            "firewall let the port through?"
        ) from None
    except ConnectionRefusedError:
        raise StartupFailed(
            f"nothing listens at {where}: start `penstock serve --listen ADDRESS:{port}` there, "
            "with an address that other hosts reach (0.0.0.0 for all)"
        ) from None
    except socket.gaierror as error:
        raise StartupFailed(f"{host} is not known: {error.strerror}") from error
    except OSError as error:
        raise StartupFailed(f"{where} cannot be reached: {error.strerror or error}") from error
    local: str = writer.get_extra_info("sockname")[0]
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return local


async def _shake_hands(address: str, keys: CurveKeys, timeout_s: float) -> bool | None:
    """Return whether the other side knows the key; None when it does not talk as we do."""
    loop = asyncio.get_running_loop()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
    caller = context.socket(zmq.PUSH)
    keys.unlock(caller)
    caller.setsockopt(zmq.IPV6, "[" in address)
    caller.setsockopt(zmq.RECONNECT_IVL, -1)
    monitor = caller.get_monitor_socket(sum(_ENDS))
    fd = int(monitor.getsockopt(zmq.FD))
    ended: asyncio.Future[bool | None] = loop.create_future()

    def listen() -> None:
        while int(monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event = parse_monitor_message(monitor.recv_multipart(zmq.DONTWAIT))["event"]
            if not ended.done():
                ended.set_result(_ENDS[zmq.Event(event)])

    loop.add_reader(fd, listen)
    try:
        caller.connect(address)
        loop.call_soon(listen)
        async with asyncio.timeout(timeout_s):
            return await ended
    except TimeoutError:
        return None
    finally:
        loop.remove_reader(fd)
        caller.disable_monitor()
        context.destroy(linger=0)
