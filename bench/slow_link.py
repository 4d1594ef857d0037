"""A link of a given rate between two processes of this machine: `bench/wire.py` puts one in front
of what workers read from each other.

Carries TCP connections to TARGET and paces the bytes that come back, all connections together. It
is emulated: no packet is lost, and the way there costs nothing but this process's own work.

    python bench/slow_link.py HOST:PORT BYTES_PER_S     # prints the address to call instead
"""

import os
import socket
import sys
import threading
import time
from contextlib import suppress

CHUNK_BYTES = 64 * 1024


class Pace:
    """When the next bytes may pass; shared by all connections."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, num_bytes: int) -> None:
        """Wait for as long as the link needs for so many."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + num_bytes / self._bytes_per_s
            left = self._free_at - now
        if left > 0:
            time.sleep(left)


def pump(source: socket.socket, destination: socket.socket, pace: Pace | None) -> None:
    """Pass on what one side says until it ends."""
    with suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            if pace is not None:
                pace.wait(len(data))
            destination.sendall(data)
    for end in (source, destination):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def end_with_parent() -> None:
    """End this process when nobody holds the other end of its standard input any more."""
    sys.stdin.read()
    os._exit(0)


def main(target: str, bytes_per_s: float) -> None:
    """Carry connections until standard input ends."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    host, _, port = target.rpartition(":")
    pace = Pace(bytes_per_s)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        near, _ = listener.accept()
        far = socket.create_connection((host, int(port)))
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for arguments in ((near, far, None), (far, near, pace)):
            threading.Thread(target=pump, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
