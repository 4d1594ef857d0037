"""Own a wire between two network namespaces: packets that are late, lost, swapped or changed.

Two kernels' worth of TCP meet over it, and the test is the cable: it reads each packet from one TUN
device and writes it to the other, as the weather permits. What the weather does is drawn from a
seed. Needs no name, no privilege beyond namespaces, and nothing of it outlives the two processes.
"""

import asyncio
import errno
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PACKET_BYTES_MAX = 1 << 16
TCP_PROTOCOL = 6
ANSWER_TIMEOUT_S = 40.0


@dataclass(frozen=True)
class Weather:
    """Shares of packets, 0 to 1, and seconds. `forged` packets carry a right checksum."""

    delay_s: float = 0.0
    lost: float = 0.0
    corrupt: float = 0.0
    reordered: float = 0.0
    forged: float = 0.0
    is_down: bool = False


class End:
    """The process behind one end of the wire."""

    def __init__(self, address: str) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.settimeout(ANSWER_TIMEOUT_S)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.far_end", str(theirs.fileno()), address],
            pass_fds=(theirs.fileno(),),
            cwd=Path(__file__).parents[2],
            # Who has threads may make no user namespace, which others than root need.
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        word, descriptors, _, _ = socket.recv_fds(self._link, 1024, 1)
        self.refusal = "" if descriptors else word.decode() or "the process ended"
        """Why there is no such process here."""
        self.device = descriptors[0] if descriptors else -1
        self._link.setblocking(False)

    async def ask(self, name: str, *arguments: object) -> object:
        """Have a command of `FarEnd` carried out, while the wire carries."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await loop.sock_sendall(self._link, json.dumps([name, *arguments]).encode())
            return json.loads(await loop.sock_recv(self._link, PACKET_BYTES_MAX))

    def close(self) -> None:
        """End the process, and with it its network."""
        self._link.close()
        if self.device >= 0:
            os.close(self.device)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


class Wire:
    """Carries packets between two ends on the running loop, from `open` to `close`."""

    def __init__(self, ends: tuple[End, End], seed: int) -> None:
        self.weather = Weather()
        self.happened: dict[str, int] = {}
        """What has been done to packets so far."""
        self.num_packets = 0
        self._devices = tuple(end.device for end in ends)
        self._rng = random.Random(seed)

    def open(self) -> None:
        """Begin to carry."""
        loop = asyncio.get_running_loop()
        here, there = self._devices
        loop.add_reader(here, self._carry, here, there)
        loop.add_reader(there, self._carry, there, here)

    def close(self) -> None:
        """Carry nothing any more."""
        for device in self._devices:
            asyncio.get_running_loop().remove_reader(device)

    def _carry(self, source: int, destination: int) -> None:
        try:
            packet = os.read(source, PACKET_BYTES_MAX)
        except BlockingIOError:
            return
        self.num_packets += 1
        if self._draws("is_down") or self._draws("lost"):
            return
        if self._draws("corrupt"):
            packet = _flipped(packet, self._rng.randrange(8 * len(packet)))
        if _is_tcp_data(packet) and self._draws("forged"):
            packet = _forged(packet)
        # Behind a dozen of those that follow it.
        late_s = 0.002 if self._draws("reordered") else 0.0
        delay_s = self.weather.delay_s + late_s
        if delay_s:
            loop = asyncio.get_running_loop()
            loop.call_later(delay_s, _deliver, destination, packet)
        else:
            _deliver(destination, packet)

    def _draws(self, what: str) -> bool:
        share = float(getattr(self.weather, what))
        is_so = share > 0 and self._rng.random() < share
        self.happened[what] = self.happened.get(what, 0) + is_so
        return is_so


def _deliver(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError as error:
        # Full, ended meanwhile, or corrupt so that it is no IP packet any more: it is lost.
        if error.errno not in (errno.EAGAIN, errno.EBADF, errno.EINVAL, errno.EIO):
            raise


def _flipped(packet: bytes, bit: int) -> bytes:
    at = bit // 8
    return packet[:at] + bytes([packet[at] ^ 1 << bit % 8]) + packet[at + 1 :]


def _is_tcp_data(packet: bytes) -> bool:
    return len(packet) > 1000 and packet[0] == 0x45 and packet[9] == TCP_PROTOCOL


def _forged(packet: bytes) -> bytes:
    """Change two bytes of the data, and the checksum so that TCP believes them."""
    at, checksum_at = 700, 20 + 16
    old, new = packet[at : at + 2], bytes((packet[at] ^ 0x10, packet[at + 1]))
    # RFC 1624: HC' = ~(~HC + ~m + m').
    numbers = (packet[checksum_at : checksum_at + 2], old, new)
    checksum, before, after = (int.from_bytes(number, "big") for number in numbers)
    total = (~checksum & 0xFFFF) + (~before & 0xFFFF) + after
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    changed = packet[:at] + new + packet[at + 2 :]
    right = (~total & 0xFFFF).to_bytes(2, "big")
    return changed[:checksum_at] + right + changed[checksum_at + 2 :]
