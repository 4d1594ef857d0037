"""Encryption and authentication of messages between hosts: ZeroMQ's CURVE under the cluster key.

Both key pairs of CURVE, that of whoever listens and that of whoever calls, are derived from the
cluster key, so who knows the key can compute all of them and nobody else has any. A caller proves
that it holds the caller's secret, the `Gatekeeper` lets no other in, and a listener that lacks the
listener's secret cannot answer. Each connection is encrypted with keys of its own that both sides
throw away, so a key that leaks later opens nothing that was recorded before.

Source: RFC 26/CurveZMQ, RFC 27/ZAP.
"""

import asyncio
import hmac
import logging
from dataclasses import dataclass
from typing import Final

import zmq
from zmq.utils import z85

ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
_DOMAIN: Final = b"penstock cluster 1 "
_WARN_INTERVAL_S: Final = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The key pairs of a cluster, each 40 characters as ZeroMQ takes them."""

    listener_public: bytes
    listener_secret: bytes
    caller_public: bytes
    caller_secret: bytes

    @classmethod
    def derive(cls, cluster_key: bytes) -> "CurveKeys":
        """Return the key pairs of the cluster that has this key."""
        secrets = [
            z85.encode(hmac.digest(cluster_key, _DOMAIN + side, "sha256"))
            for side in (b"listener", b"caller")
        ]
        publics = [zmq.curve_public(secret) for secret in secrets]
        return cls(publics[0], secrets[0], publics[1], secrets[1])

    def guard(self, socket: "zmq.Socket[bytes]") -> None:
        """Make what `socket` binds from now on open to callers of this cluster alone."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.listener_secret)

    def unlock(self, socket: "zmq.Socket[bytes]") -> None:
        """Make `socket` call as a member of this cluster, and talk to no listener of another."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.listener_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.caller_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.caller_secret)


class Gatekeeper:
    """Answers ZeroMQ's question who may come in, on the running loop's thread.

    One for each context, and there before the first socket is bound.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", keys: CurveKeys) -> None:
        self.num_refused = 0
        self._caller: bytes = z85.decode(keys.caller_public)
        self._warned_s = -_WARN_INTERVAL_S
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.REP)
        self._socket.bind(ZAP_ADDRESS)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._answer_all)

    def close(self) -> None:
        """Answer no more; nobody new comes in."""
        self._loop.remove_reader(self._fd)
        self._socket.close(0)

    def _answer_all(self) -> None:
        # The descriptor signals edges, and sending may swallow one: go on until nothing is left.
        while not self._socket.closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._answer(self._socket.recv_multipart(zmq.DONTWAIT))

    def _answer(self, question: list[bytes]) -> None:
        version, request_id, _domain, address, _identity, mechanism = question[:6]
        is_member = mechanism == b"CURVE" and hmac.compare_digest(question[6], self._caller)
        status = [b"200", b"OK"] if is_member else [b"400", b"this is not the caller's key"]
        self._socket.send_multipart([version, request_id, *status, b"", b""])
        if is_member:
            return
        self.num_refused += 1
        # Once a second, or a stranger could fill the disk with it.
        if self._loop.time() - self._warned_s >= _WARN_INTERVAL_S:
            self._warned_s = self._loop.time()
            _log.warning("a caller from %s has another key: refused", address.decode())
