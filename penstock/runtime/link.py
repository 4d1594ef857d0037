"""What the front and the host process say to each other, and the socket over which they do.

A pair of sequenced-packet sockets: one packet is one struct, and the end of either process is the
end of the stream for the other. Front: `Prepare` once, then `Fork` and `Kill`. Host: `Progress`
while it loads, `Ready` or `Failed`, then `Forked` and `Exited` for each worker.
"""

import socket
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from penstock.core.block import KVLayout
from penstock.core.types import MIB, Role, WorkerId
from penstock.runtime.settings import ClusterSettings, ModelFacts

PACKET_BYTES_MAX = MIB


class Prepare(Struct, frozen=True, tag=True):
    """Load the model. `controller_address` is where workers report.

    A host that has joined adds what it knows of the controller: `layout` is what the model must
    have (None: any), `clock_offset_ns` what the controller's clock is ahead, None on its machine.
    """

    settings: ClusterSettings
    folder: str
    controller_address: str
    layout: KVLayout | None = None
    clock_offset_ns: int | None = None


class WorkerSpec(Struct, frozen=True, kw_only=True):
    """One incarnation of a worker. `index` numbers the workers of the host from 0."""

    worker_id: WorkerId
    role: Role
    epoch: int
    index: int


class Fork(Struct, frozen=True, tag=True):
    """Start a worker."""

    spec: WorkerSpec


class Kill(Struct, frozen=True, tag=True):
    """End this incarnation now; answered by `Exited`."""

    worker_id: WorkerId
    epoch: int


class Progress(Struct, frozen=True, tag=True):
    """What the host is doing, and which part of it is done, 0 to 1."""

    stage: str
    fraction: float


class Ready(Struct, frozen=True, tag=True):
    """The model is loaded: workers can be forked."""

    model: ModelFacts


class Failed(Struct, frozen=True, tag=True):
    """The model cannot be loaded; `message` says what to change. The host ends."""

    message: str


class Forked(Struct, frozen=True, tag=True):
    """A worker process exists."""

    worker_id: WorkerId
    epoch: int
    pid: int


class Exited(Struct, frozen=True, tag=True):
    """A worker process is gone. `last_lines` are the end of what it wrote to stderr."""

    worker_id: WorkerId
    epoch: int
    reason: str
    last_lines: tuple[str, ...]


ToHost = Prepare | Fork | Kill
ToFront = Progress | Ready | Failed | Forked | Exited
Incoming = TypeVar("Incoming")


class Link(Generic[Incoming]):
    """One end. `decoder` is for the structs that this end receives."""

    def __init__(
        self, connection: socket.socket, decoder: msgspec.msgpack.Decoder[Incoming]
    ) -> None:
        self._socket = connection
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_BYTES_MAX)
        self._decode = decoder.decode

    def fileno(self) -> int:
        """Return the descriptor, to be watched for reading."""
        return self._socket.fileno()

    def send(self, message: ToHost | ToFront) -> bool:
        """Send one struct; return False when the other side is gone."""
        try:
            self._socket.send(msgspec.msgpack.encode(message))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> Incoming | None:
        """Wait for one struct; None when the other side is gone."""
        try:
            packet = self._socket.recv(PACKET_BYTES_MAX)
        except ConnectionResetError:
            return None
        return self._decode(packet) if packet else None

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


def link_pair() -> tuple[Link[ToFront], socket.socket]:
    """Return the front's end, and the socket that the host is to inherit."""
    front, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Link(front, msgspec.msgpack.Decoder(ToFront)), host


def host_link(fd: int) -> Link[ToHost]:
    """Return the host's end of the socket that it inherited as `fd`."""
    return Link(socket.socket(fileno=fd), msgspec.msgpack.Decoder(ToHost))
