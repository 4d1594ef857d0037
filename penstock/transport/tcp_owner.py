"""The owner's side of TCP: listens, authenticates, and hands each connection to a server.

The server is native: its threads send blocks straight out of the regions and never ask for the
interpreter lock, so that an owner which computes serves all the same. Python takes part in the
handshake alone, in a thread of its own for each caller, with a deadline and a limit on their
number. There is no operation that writes to a region.
"""

import logging
import math
import selectors
import socket
import threading
import time
from contextlib import suppress
from ctypes import CDLL, create_string_buffer
from typing import Final, Protocol

import numpy as np

from penstock.core.descriptors import Endpoint
from penstock.core.errors import DeadlineExceeded, PeerLost, StartupFailed
from penstock.transfer.region import Region
from penstock.transport import wire
from penstock.transport.encoded import BLOCK_BYTES_MIN, WireCodec, row_bytes
from penstock.transport.handshake import admit
from penstock.transport.native.library import load_library
from penstock.transport.tcp import SILENCE_S, TCP, tune
from penstock.transport.tcp_python import PythonServer

HANDSHAKE_S: Final = 5.0
HANDSHAKES_MAX: Final = 32
CONNECTIONS_MAX: Final = 1024

log = logging.getLogger(__name__)


class Server(Protocol):
    """What serves connections that are authenticated."""

    def add(self, region: Region) -> int:
        """Let a region be read; return its index."""

    def add_encoded(self, index: int, codec: WireCodec) -> int | None:
        """Let a region that was added be read encoded as well; return the index of its rows, None
        where that is not possible.
        """

    def serve(self, stream: socket.socket) -> bool:
        """Take a connection over, or return False and leave it alone."""

    def heard(self) -> bytes | None:
        """Take one notification out."""

    def close(self) -> None:
        """End every connection; then no region is read any more."""


class NativeServer:
    """Threads of C++ that know regions by address; it keeps the arrays behind them alive."""

    def __init__(self, library: CDLL, epoch: int, silence_s: float, connections_max: int) -> None:
        self._library = library
        self._regions: list[Region] = []
        self._codecs: list[WireCodec] = []
        self._text = create_string_buffer(wire.TEXT_MAX)
        silence_ms = round(silence_s * 1000)
        self._server = library.penstock_server_new(epoch, silence_ms, connections_max)

    def add(self, region: Region) -> int:
        """Let a region be read; return its index."""
        self._regions.append(region)
        return int(
            self._library.penstock_server_add(
                self._server, region.address, region.num_blocks, region.block_bytes
            )
        )

    def add_encoded(self, index: int, codec: WireCodec) -> int | None:
        """Let a region be read encoded as well; return the index of its rows, None without native
        codecs: these threads call no Python.
        """
        encoder = codec.native_encoder
        if encoder is None or codec.block_bytes < BLOCK_BYTES_MIN:
            return None
        assert self._regions[index].block_bytes == codec.block_bytes, codec.block_bytes
        self._codecs.append(codec)
        return int(
            self._library.penstock_server_add_encoded(
                self._server,
                index,
                encoder.function,
                encoder.method,
                encoder.shape,
                len(encoder.shape),
                codec.block_bytes,
                row_bytes(codec),
            )
        )

    def serve(self, stream: socket.socket) -> bool:
        """Take an authenticated connection over, or return False and leave it alone."""
        stream.settimeout(None)
        if self._library.penstock_server_serve(self._server, stream.fileno()) != 0:
            return False
        stream.detach()
        return True

    def heard(self) -> bytes | None:
        """Take one notification out."""
        size = self._library.penstock_server_heard(self._server, self._text)
        return self._text.raw[:size] if size >= 0 else None

    @property
    def counts(self) -> list[int]:
        """Reads, bytes, notifications, then refusals by status."""
        counts = np.zeros(3 + len(wire.Status) - 1, np.int64)
        self._library.penstock_server_counts(self._server, counts.ctypes.data)
        return [int(count) for count in counts]

    def close(self) -> None:
        """End every connection; then no region is read any more."""
        self._library.penstock_server_delete(self._server)
        self._regions.clear()


class TcpOwner:
    """Lets peers that know the cluster key read `regions`, from construction to `close`.

    `advertised` is the host that peers call when it is not the one listened on.
    Raises: `StartupFailed` when the address cannot be listened on.
    """

    def __init__(
        self,
        epoch: int,
        key: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertised: str | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.num_strangers = 0
        """Connections that were refused before they were authenticated."""
        self._key = key
        self._advertised = advertised
        self._warned_at = -math.inf
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise StartupFailed(f"reads cannot be served at {host}:{port}: {error}") from error
        library = load_library()
        self.server: NativeServer | PythonServer = (
            PythonServer(epoch, silence_s, CONNECTIONS_MAX)
            if library is None
            else NativeServer(library, epoch, silence_s, CONNECTIONS_MAX)
        )
        self._is_closed = False
        self._admitting: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._bell, self._button = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="tcp-owner", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        """Where peers find it."""
        host, port = self._listener.getsockname()[:2]
        host = self._advertised or host
        return Endpoint(TCP, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def add(self, region: Region) -> int:
        """Let a region be read; return its index. Its memory stays until `close`."""
        return self.server.add(region)

    def add_encoded(self, index: int, codec: WireCodec) -> int | None:
        """Let a region that was added be read encoded as well (`encoded.py`); return the index of
        its rows, None where that is not possible.
        """
        return self.server.add_encoded(index, codec)

    def heard(self) -> bytes | None:
        """Take one notification out, or return None."""
        return None if self._is_closed else self.server.heard()

    def close(self) -> None:
        """Stop listening and end every connection; then no region is read any more."""
        if self._is_closed:
            return
        self._is_closed = True
        self._button.send(b"!")
        self._thread.join()
        for opened in (self._listener, self._bell, self._button):
            opened.close()
        with self._lock:
            for stream in self._admitting:
                with suppress(OSError):  # ended meanwhile
                    stream.shutdown(socket.SHUT_RDWR)
        self.server.close()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._listener.setblocking(False)
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while True:
                selector.select()
                if self._is_closed:
                    return
                try:
                    stream, address = self._listener.accept()
                except OSError as error:
                    # The caller is gone again, or there are no more descriptors: others go on.
                    log.warning("a connection could not be accepted: %s", error)
                    self._rest(selector)
                    continue
                self._start_admitting(stream, str(address[0]))

    def _rest(self, selector: selectors.BaseSelector) -> None:
        """Wait a moment, unless it ends: without descriptors the listener stays ready."""
        selector.unregister(self._listener)
        selector.select(0.1)
        selector.register(self._listener, selectors.EVENT_READ)

    def _start_admitting(self, stream: socket.socket, address: str) -> None:
        with self._lock:
            if len(self._admitting) >= HANDSHAKES_MAX:
                self._refuse(stream, address, "too many handshakes are under way")
                return
            self._admitting.add(stream)
        threading.Thread(target=self._admit, args=(stream, address), daemon=True).start()

    def _admit(self, stream: socket.socket, address: str) -> None:
        refusal = None
        try:
            tune(stream)
            admit(stream, self._key, HANDSHAKE_S)
        except (PeerLost, DeadlineExceeded, OSError) as error:
            refusal = str(error)
        with self._lock:
            self._admitting.discard(stream)
            if refusal is None and not self._is_closed and self.server.serve(stream):
                return
            self._refuse(stream, address, refusal or "there are too many connections")

    def _refuse(self, stream: socket.socket, address: str, why: str) -> None:
        stream.close()
        # Once a second, or a stranger could fill the disk with it.
        if time.monotonic() - self._warned_at >= 1.0:
            self._warned_at = time.monotonic()
            log.warning("a connection from %s is refused: %s", address, why)
        self.num_strangers += 1
