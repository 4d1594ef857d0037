"""One end of a wire between two hosts: a process in a network namespace of its own.

Its only link is a TUN device: what its kernel sends there, the test reads as packets, and what the
test writes, arrives. The descriptor of the device goes to the test over the socket that this
process is started with; then it obeys, one packet of JSON for each command and each answer, until
the socket ends. `python -m tests.faults.far_end SOCKET ADDRESS`; started by `wire.py`.
"""

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time

import numpy as np

from penstock.core.errors import DeadlineExceeded, PeerLost
from penstock.transfer.digest import take_digests
from penstock.transport import Agent

NUM_BLOCKS = 32
BLOCK_BYTES = 1 << 15
DEVICE = b"link0"
KEY = bytes(range(32))

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
TUNSETIFF, TUN_WITHOUT_INFO = 0x400454CA, 0x1001
SIOCSIFADDR, SIOCSIFNETMASK, SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8916, 0x891C, 0x8913, 0x8914
UP = 1


def leave_the_network() -> None:
    """Be alone in a new network namespace. Raises: `OSError` when that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = NEW_NETWORK if os.geteuid() == 0 else NEW_NETWORK | NEW_USER
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace can be made (unshare)")


def plug_in(address: str) -> int:
    """Make the device, with an address in a network of 256; return its descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE, TUN_WITHOUT_INFO))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for request, dotted in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.0")):
            name = struct.pack("16sHH4s16x", DEVICE, socket.AF_INET, 0, socket.inet_aton(dotted))
            fcntl.ioctl(any_socket, request, name)
        flags = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sH22x", DEVICE, 0))
        (now,) = struct.unpack_from("H", flags, 16)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", DEVICE, now | UP))
    return device


class FarEnd:
    """What the test may ask of an agent in here. Public methods are the commands."""

    def __init__(self, address: str) -> None:
        self._agent = Agent(transport="tcp", host=address, key=KEY)
        self._region = self._agent.allocate(NUM_BLOCKS, BLOCK_BYTES)

    def fill(self, seed: int) -> list[object]:
        """Put bytes into the blocks; return the descriptor and what the digests are."""
        rng = np.random.default_rng(seed)
        self._region.blocks[:] = rng.integers(0, 256, self._region.blocks.shape, np.uint8)
        return [self._agent.descriptor().hex(), self._digests()]

    def pull(self, descriptor: str) -> list[object]:
        """Pull all blocks; return the digests of what has come or the error, and the seconds."""
        self._region.blocks[:] = 0
        peer = self._agent.connect(bytes.fromhex(descriptor))
        blocks = np.arange(NUM_BLOCKS)
        started = time.monotonic()
        try:
            self._agent.pull(peer, blocks, self._region, blocks)
        except (PeerLost, DeadlineExceeded) as error:
            return [f"{type(error).__name__}: {error}", time.monotonic() - started]
        return [self._digests(), time.monotonic() - started]

    def netem(self, *arguments: str) -> str:
        """Let the kernel spoil what is sent from here; return its complaint, or ""."""
        command = ["tc", "qdisc", "replace", "dev", DEVICE.decode(), "root", "netem", *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stderr
        except FileNotFoundError as error:
            return str(error)

    def _digests(self) -> list[str]:
        return [f"{d:016x}" for d in take_digests(self._region.blocks, range(NUM_BLOCKS))]


def main(link: socket.socket, address: str) -> None:
    """Obey until the test is over."""
    try:
        leave_the_network()
        device = plug_in(address)
    except OSError as error:
        link.send(str(error).encode())
        return
    socket.send_fds(link, [b"up"], [device])
    os.close(device)
    end = FarEnd(address)
    while command := link.recv(1 << 16):
        name, *arguments = json.loads(command)
        link.send(json.dumps(getattr(end, name)(*arguments)).encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
