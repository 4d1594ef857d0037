"""Mutual authentication of a TCP connection by the cluster key, before a word of anything else.

    reader -> owner   greeting (8 bytes), reader's nonce (32)
    owner -> reader   owner's nonce (32)
    reader -> owner   HMAC-SHA256(key, "reader" | both nonces)
    owner -> reader   HMAC-SHA256(key, "owner" | both nonces)

The reader proves itself first: until then it gets a random number and nothing else. A proof is of
no use for another connection, since both sides put a nonce in, nor for the other direction. The
connection is authenticated, not encrypted: on a network that others can write to, use a tunnel.
Blocking sockets; every wait counts towards one deadline.
"""

import hmac
import secrets
import socket
import time
from typing import Final

from penstock.core.errors import DeadlineExceeded, PeerLost

GREETING: Final = b"PNSTOCK\x01"
NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32


def prove(connection: socket.socket, key: bytes, timeout_s: float) -> None:
    """Be the reader.

    Raises: `PeerLost` when the other side hangs up or does not prove itself, `DeadlineExceeded`.
    """
    deadline = time.monotonic() + timeout_s
    mine = secrets.token_bytes(NONCE_BYTES)
    _send(connection, GREETING + mine, deadline)
    theirs = _receive(connection, NONCE_BYTES, deadline)
    _send(connection, _proof(key, b"reader", mine, theirs), deadline)
    proof = _receive(connection, PROOF_BYTES, deadline, "it does not accept our cluster key")
    if not hmac.compare_digest(proof, _proof(key, b"owner", mine, theirs)):
        raise PeerLost("it does not know our cluster key")


def admit(connection: socket.socket, key: bytes, timeout_s: float) -> None:
    """Be the owner.

    Raises: `PeerLost` when the other side hangs up, talks something else or does not prove itself,
    `DeadlineExceeded`.
    """
    deadline = time.monotonic() + timeout_s
    if _receive(connection, len(GREETING), deadline) != GREETING:
        raise PeerLost("it does not greet as a peer does")
    theirs = _receive(connection, NONCE_BYTES, deadline)
    mine = secrets.token_bytes(NONCE_BYTES)
    _send(connection, mine, deadline)
    proof = _receive(connection, PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, _proof(key, b"reader", theirs, mine)):
        raise PeerLost("it does not know our cluster key")
    _send(connection, _proof(key, b"owner", theirs, mine), deadline)


def _proof(key: bytes, side: bytes, reader_nonce: bytes, owner_nonce: bytes) -> bytes:
    return hmac.digest(key, GREETING + side + reader_nonce + owner_nonce, "sha256")


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    try:
        connection.settimeout(_left_s(deadline))
        connection.sendall(data)
    except TimeoutError:
        raise DeadlineExceeded("the handshake took too long") from None
    except OSError as error:
        raise PeerLost(f"it hung up: {error}") from error


def _receive(
    connection: socket.socket, size: int, deadline: float, end: str = "it hung up"
) -> bytes:
    data = b""
    while len(data) < size:
        try:
            connection.settimeout(_left_s(deadline))
            chunk = connection.recv(size - len(data))
        except TimeoutError:
            raise DeadlineExceeded("the handshake took too long") from None
        except OSError as error:
            raise PeerLost(f"{end}: {error}") from error
        if not chunk:
            raise PeerLost(end)
        data += chunk
    return data


def _left_s(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
