"""The private directory of one cluster: its Unix sockets, readable by nobody else.

It is removed by the front at its end, by the host when the front was killed, and, should both have
been killed at once, by the next cluster that this user starts.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "penstock-"
LOCK = "lock"


class RunFolder:
    """A directory of mode 0700 that counts as in use for as long as this process holds its lock."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def create(cls, parent: Path | None = None) -> "RunFolder":
        """Make a new one below `parent`, by default $XDG_RUNTIME_DIR or the temporary folder.

        Abandoned ones of this user beside it are removed.
        """
        parent = parent or _default_parent()
        sweep(parent)
        # The name changes once the lock is held, so that nobody takes it for an abandoned one.
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        lock_fd = os.open(made / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        return cls(made.rename(parent / made.name.removeprefix(".")), lock_fd)

    def remove(self) -> None:
        """Remove the directory and everything in it; a second time is harmless."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def sweep(parent: Path) -> None:
    """Remove this user's directories below `parent` whose owner is gone."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            fd = os.open(path / LOCK, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


def _default_parent() -> Path:
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    if runtime_dir and os.access(runtime_dir, os.W_OK | os.X_OK):
        return Path(runtime_dir)
    return Path(tempfile.gettempdir())
