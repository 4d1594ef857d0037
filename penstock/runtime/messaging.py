"""`Messenger`: messages between nodes over ZeroMQ: a private Unix socket per node, and a port
beside it where other hosts take part.

Each node binds one PULL socket, or two, and opens a PUSH socket to a peer when it first has an
address for it: there is no world to join. What crosses TCP is encrypted, and only members of the
cluster can speak or listen (`curve.py`). A frame is an `Envelope`: the sender, its epoch, and all
messages that one turn of the loop had for this peer. Messages between two nodes arrive in order or,
from some point on, not at all: a link whose peer is gone or does not read is cut for good rather
than left with a gap (save between workers of two hosts, whose hand-offs bear one). An address
belongs to one incarnation of a worker, so nothing meant for a dead one reaches its successor; what
a dead one had said is dropped once `forget` has been called; and what a peer says before the
controller has introduced it waits until then.

The raw socket with its descriptor in the loop costs 9 µs of CPU per message where `zmq.asyncio`
costs 28 (Zen 5, both ends decoding 16 tokens). It knows no core: `transport.py` puts it behind the
port.
"""

import asyncio
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import zmq
from msgspec import Raw, Struct

from penstock.core.errors import StartupFailed
from penstock.core.messages import WIRE_ERRORS, Message, encode_message
from penstock.core.types import CONTROLLER, MIB, WorkerId
from penstock.runtime.curve import CurveKeys, Gatekeeper
from penstock.runtime.settings import NetworkSettings
from penstock.transport.key import cluster_key

HIGH_WATER_MARK = 10_000
"""Frames that wait for a peer before its link is cut. One worker sends a frame per model step."""
FRAME_BYTES_MAX = 64 * MIB
FRAMES_PER_TURN = 256
"""Frames read before other callbacks of the loop have their turn."""
LINGER_MS = 200
END_S = 5.0
SOCKET_PATH_MAX = 107
REOPEN_INTERVAL_S = 1.0
"""Between two attempts to reach a worker of another host again."""
HELD_FRAMES_MAX = 1000
"""Frames kept for peers that have not been introduced yet."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Network:
    """Where a node listens for other hosts: `host` is one of this machine's addresses, `advertised`
    what others call it by, the same if "". Port 0 takes a free one.
    """

    keys: CurveKeys
    host: str
    port: int = 0
    advertised: str = ""


def open_network(settings: NetworkSettings, port: int = 0) -> Network:
    """Return where a node of this host listens. Raises: `StartupFailed` when there is no key."""
    key = cluster_key(Path(settings.key_file) if settings.key_file else None)
    return Network(CurveKeys.derive(key), settings.host, port, settings.advertised)


class Envelope(Struct, frozen=True, array_like=True):
    """A frame as it is sent; its messages are encoded already."""

    sender: WorkerId
    epoch: int
    messages: list[Raw]


class OpenedEnvelope(Struct, frozen=True, array_like=True):
    """A frame as it is received."""

    sender: WorkerId
    epoch: int
    messages: list[Message]


class _Link:
    """The way to one incarnation of a peer. `socket` is None once the link is cut."""

    def __init__(self, epoch: int, address: str, socket: zmq.Socket[bytes] | None) -> None:
        self.epoch = epoch
        self.address = address
        self.opened_s = -math.inf
        self.socket = socket
        self.outbox: list[Raw] = []


class Messenger:
    """All links of one node. Lives on the thread of the loop that runs when it is opened."""

    def __init__(
        self,
        name: WorkerId,
        epoch: int,
        folder: Path,
        deliver: Callable[[Message], None],
        *,
        hears_strangers: bool = False,
        high_water_mark: int = HIGH_WATER_MARK,
        network: Network | None = None,
        on_fenced: Callable[[WorkerId, int], None] = lambda sender, epoch: None,
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.num_dropped = 0
        """Frames and messages that were not delivered: not understood, fenced off, or to nobody."""
        self.heard_s: dict[WorkerId, tuple[int, float]] = {}
        """Of each sender the incarnation that was heard last, and when, by the loop's clock."""
        self.remote_address = ""
        """Where nodes on other hosts reach this one, once it is open."""
        self._network = network
        self._on_fenced = on_fenced
        self._gatekeeper: Gatekeeper | None = None
        self._path = folder / f"{name}.{epoch}.sock"
        self._deliver = deliver
        self._hears_strangers = hears_strangers
        self._high_water_mark = high_water_mark
        self._links: dict[WorkerId, _Link] = {}
        self._fences: dict[WorkerId, int] = {}
        self._held: list[OpenedEnvelope] = []
        self._is_flush_due = False
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(OpenedEnvelope).decode

    @property
    def address(self) -> str:
        """Where nodes of the same private folder reach this incarnation of this node."""
        return f"ipc://{self._path}"

    def open(self) -> None:
        """Bind and start to listen.

        Raises: `StartupFailed` when the socket cannot be made.
        """
        if len(bytes(self._path)) > SOCKET_PATH_MAX:
            raise StartupFailed(
                f"{self._path}: longer than the {SOCKET_PATH_MAX} bytes that a Unix socket's path "
                "may have: set TMPDIR to a shorter folder"
            )
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._inboxes: list[zmq.Socket[bytes]] = []
        self._listen(self.address)
        if self._network is not None:
            self._gatekeeper = Gatekeeper(self._context, self._network.keys)
            self._listen_to_hosts(self._network)

    def _listen(self, address: str, keys: CurveKeys | None = None) -> zmq.Socket[bytes]:
        inbox = self._context.socket(zmq.PULL)
        inbox.setsockopt(zmq.RCVHWM, self._high_water_mark)
        inbox.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        if keys is not None:
            keys.guard(inbox)
            inbox.setsockopt(zmq.IPV6, "[" in address)
        try:
            inbox.bind(address)
        except zmq.ZMQError as error:
            inbox.close(0)
            raise StartupFailed(f"cannot listen at {address}: {error}") from error
        self._inboxes.append(inbox)
        read = partial(self._read, inbox)
        self._loop.add_reader(int(inbox.getsockopt(zmq.FD)), read)
        # The descriptor signals edges: whatever came before it was watched is read now.
        self._loop.call_soon(read)
        return inbox

    def _listen_to_hosts(self, network: Network) -> None:
        host = f"[{network.host}]" if ":" in network.host else network.host
        inbox = self._listen(f"tcp://{host}:{network.port or '*'}", network.keys)
        endpoint = inbox.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes), endpoint
        port = endpoint.rstrip(b"\0").rpartition(b":")[2].decode()
        known_as = network.advertised or network.host
        known_as = f"[{known_as}]" if ":" in known_as else known_as
        self.remote_address = f"tcp://{known_as}:{port}"

    def close(self) -> None:
        """Send what is queued, waiting at most `LINGER_MS`, and forget all links."""
        self._flush()
        for inbox in self._inboxes:
            self._loop.remove_reader(int(inbox.getsockopt(zmq.FD)))
            inbox.close(0)
        if self._gatekeeper is not None:
            self._gatekeeper.close()
        for link in self._links.values():
            _cut(link, LINGER_MS)
        self._links.clear()
        _end(self._context)
        self._path.unlink(missing_ok=True)

    def connect(self, peer: WorkerId, epoch: int, address: str) -> None:
        """Open the link to an incarnation of `peer`; earlier ones are forgotten."""
        link = self._links.get(peer)
        if link is not None and link.epoch >= epoch:
            return
        self.forget(peer, epoch - 1)
        self._links[peer] = _Link(epoch, address, self._call(address))

    def renew(self, peer: WorkerId) -> None:
        """Open the link to a peer anew, for another program at the same address; what was queued
        for the old one is dropped.
        """
        link = self._links[peer]
        _cut(link, 0)
        link.socket = self._call(link.address)

    def route(self, address: str, remote_address: str) -> str:
        """Return which of a node's two addresses leads there from here."""
        is_near = Path(address.removeprefix("ipc://")).parent == self._path.parent
        return address if is_near or not remote_address else remote_address

    def _call(self, address: str) -> zmq.Socket[bytes] | None:
        """Return a socket that calls; None where a peer's address is none."""
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, self._high_water_mark)
        # A worker's address is never bound twice, and what a cut connection swallowed is missing.
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if address.startswith("tcp:"):
            assert self._network is not None, f"{self.name} has no key for {address}"
            self._network.keys.unlock(socket)
            socket.setsockopt(zmq.IPV6, "[" in address)
            socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            _log.warning("%r cannot be called: %s", address, error)
            socket.close(0)
            return None
        return socket

    def forget(self, peer: WorkerId, epoch: int) -> None:
        """Cut the link to a dead incarnation, and drop what it may still have said."""
        self._fences[peer] = max(epoch, self._fences.get(peer, epoch))
        link = self._links.get(peer)
        if link is not None and link.epoch <= epoch:
            _cut(link, 0)
            del self._links[peer]

    def send(self, to: WorkerId, message: Message) -> None:
        """Queue a message for this turn's frame. A peer that is unknown or gone swallows it.

        Encodes at once, so that `message` may change afterwards.
        """
        link = self._links.get(to)
        if link is None or link.socket is None:
            self.num_dropped += 1
            return
        link.outbox.append(Raw(encode_message(message)))
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        for peer, link in self._links.items():
            if not link.outbox or link.socket is None:
                continue
            frame = self._encode(Envelope(self.name, self.epoch, link.outbox))
            if not self._push(link, frame):
                self._push_anew(peer, link, frame)
            link.outbox = []

    def _push(self, link: _Link, frame: bytes) -> bool:
        if link.socket is None:
            return False
        try:
            link.socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def _push_anew(self, peer: WorkerId, link: _Link, frame: bytes) -> None:
        """Cut a link for good that takes nothing; but one to a worker of another host, which may
        have been cut on the way, is opened again once in a while.

        What that one swallowed is missing, which a hand-off between workers can bear. What a
        controller and a worker say to each other must be whole: there, silence decides.
        """
        is_between_workers = CONTROLLER not in (peer, self.name)
        if not (is_between_workers and link.address.startswith("tcp:")):
            self.num_dropped += len(link.outbox)
            _cut(link, 0)
            _log.warning("%s is gone or does not read: its link is cut", peer)
            return
        now_s, is_sent = self._loop.time(), False
        if now_s - link.opened_s >= REOPEN_INTERVAL_S:
            _log.warning("the link to %s was cut: it is opened anew", peer)
            outbox = link.outbox
            _cut(link, 0)
            link.socket, link.outbox, link.opened_s = self._call(link.address), outbox, now_s
            is_sent = self._push(link, frame)
        if not is_sent:
            self.num_dropped += len(link.outbox)

    def _read(self, inbox: zmq.Socket[bytes]) -> None:
        """Deliver what has come in. Unless the socket is empty in the end, ask for another turn:
        the descriptor tells of a change only once.
        """
        is_empty = False
        try:
            for _ in range(FRAMES_PER_TURN):
                if inbox.closed:
                    return
                self._take(inbox.recv(zmq.DONTWAIT))
        except zmq.Again:
            is_empty = True
        finally:
            if not is_empty and not inbox.closed:
                self._loop.call_soon(self._read, inbox)

    def _take(self, frame: bytes) -> None:
        try:
            envelope = self._decode(frame)
        except WIRE_ERRORS as error:
            self.num_dropped += 1
            _log.warning("a frame of %d bytes was dropped: %s", len(frame), error)
            return
        self.heard_s[envelope.sender] = envelope.epoch, self._loop.time()
        if not self._held and self._is_introduced(envelope):
            self._deliver_all(envelope)
            return
        self._held.append(envelope)
        # An introduction may just have come in: what its subject said before goes first.
        while (introduced := next(filter(self._is_introduced, self._held), None)) is not None:
            self._held.remove(introduced)
            self._deliver_all(introduced)
        if len(self._held) > HELD_FRAMES_MAX:
            stranger = self._held.pop(0)
            self.num_dropped += len(stranger.messages)
            _log.warning("a frame of %s was dropped: never introduced", stranger.sender)

    def _is_introduced(self, envelope: OpenedEnvelope) -> bool:
        """True when it is time to deliver the frame, or to drop it."""
        if self._hears_strangers or envelope.epoch <= self._fences.get(envelope.sender, -1):
            return True
        link = self._links.get(envelope.sender)
        return link is not None and link.epoch >= envelope.epoch

    def _deliver_all(self, envelope: OpenedEnvelope) -> None:
        if envelope.epoch <= self._fences.get(envelope.sender, -1):
            self._on_fenced(envelope.sender, envelope.epoch)
        for message in envelope.messages:
            # Looked up each time: the message before may have told of the sender's end.
            if envelope.epoch <= self._fences.get(envelope.sender, -1):
                self.num_dropped += 1
            else:
                self._deliver(message)


def _end(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    """End a context whose sockets are closed, or leave it to the process's end.

    Once in a great while a link to a process that was killed while it was called keeps ZeroMQ from
    coming to an end, however short its lingering; who stops must not wait for that.
    """
    thread = threading.Thread(target=context.term, name="zmq-term", daemon=True)
    thread.start()
    thread.join(END_S)
    if thread.is_alive():
        _log.warning(
            "ZeroMQ has not ended within %g s: it is left to the end of the process", END_S
        )


def _cut(link: _Link, linger_ms: int) -> None:
    if link.socket is not None:
        link.socket.close(linger_ms)
        link.socket = None
        link.outbox = []
