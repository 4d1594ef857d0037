"""The socket that a server listens at, opened before anything else so that a taken port is known at
once.
"""

import errno
import os
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from penstock.core.errors import StartupFailed

BACKLOG = 2048


class Listener:
    """A listening socket and how clients name it."""

    def __init__(self, listening: socket.socket, address: str, path: Path | None = None) -> None:
        self.socket = listening
        self.address = address
        self._path = path

    @property
    def is_open_to_others(self) -> bool:
        """True when other machines may be able to connect."""
        if self._path is not None:
            return False
        return not ip_address(self.socket.getsockname()[0]).is_loopback

    @classmethod
    def tcp(cls, host: str, port: int) -> "Listener":
        """Listen at a TCP port; 0 takes a free one.

        Raises: `StartupFailed` when it is taken, forbidden, or `host` is not this machine's.
        """
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        except socket.gaierror as error:
            raise StartupFailed(f"--host {host}: {error.strerror}") from error
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(BACKLOG)
        except OSError as error:
            listening.close()
            raise StartupFailed(_explain(error, host, port)) from error
        listening.setblocking(False)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        if ":" in shown:
            shown = f"[{shown}]"
        return cls(listening, f"http://{shown}:{listening.getsockname()[1]}")

    @classmethod
    def unix(cls, path: Path) -> "Listener":
        """Listen at a Unix socket that only this user can open.

        Raises: `StartupFailed` when something is there already, or the path cannot be used.
        """
        listening = socket.socket(socket.AF_UNIX)
        try:
            _remove_stale(path)
            mask = os.umask(0o177)
            try:
                listening.bind(str(path))
            finally:
                os.umask(mask)
            listening.listen(BACKLOG)
        except OSError as error:
            listening.close()
            reason = error.strerror or str(error)
            raise StartupFailed(f"--uds {path}: {reason}: choose another path") from error
        listening.setblocking(False)
        return cls(listening, f"unix:{path}", path)

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _explain(error: OSError, host: str, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} is taken: choose another with --port, or --port 0 for a free one"
        case errno.EACCES:
            return f"port {port} is not allowed for this user: choose one from 1024 on with --port"
        case errno.EADDRNOTAVAIL:
            return f"--host {host}: this machine has no such address"
    return f"cannot listen at {host}:{port}: {error.strerror}"


def _remove_stale(path: Path) -> None:
    """Remove a Unix socket that nobody listens at any more."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                path.unlink()
