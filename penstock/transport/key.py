"""The cluster key: who knows it may read the KV of others, so it comes over no wire.

From the environment variable PENSTOCK_CLUSTER_KEY, or a file of this user's alone, which is made
when there is none. All processes of a user on one host share it without a word; another host is
given a copy.
"""

import os
import secrets
import stat
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

from penstock.core.errors import StartupFailed

VARIABLE: Final = "PENSTOCK_CLUSTER_KEY"
CHARACTERS_MIN: Final = 16
_FILE_BYTES_MAX: Final = 4096


def cluster_key(path: Path | None = None) -> bytes:
    """Return the 32 bytes that every peer must know; `path` overrides where the file is.

    Raises: `StartupFailed` when the key is too short, or its file is open to others or cannot be
    used.
    """
    named = os.environ.get(VARIABLE)
    if named is not None and path is None:
        return _digest(named, f"the environment variable {VARIABLE}")
    file = path or _default_path()
    try:
        if not file.exists():
            _make(file)
        return _digest(_read(file), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise StartupFailed(f"the cluster key in {file} cannot be used: {error}") from error


def key_location(path: Path | None = None) -> str:
    """Say where `cluster_key` finds the key, for people."""
    if path is None and VARIABLE in os.environ:
        return f"the environment variable {VARIABLE}"
    return str(path or _default_path())


def _default_path() -> Path:
    root = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    return Path(root) / "penstock" / "cluster.key"


def _make(file: Path) -> None:
    """Write a new key beside the place and link it there: of two processes one wins, both agree."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_hex(32) + "\n")
        with suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink()


def _read(file: Path) -> str:
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise StartupFailed(
                f"the cluster key in {file} can be read by others: `chmod 600 {file}`, or put "
                f"another key there"
            )
        return opened.read(_FILE_BYTES_MAX).decode()


def _digest(text: str, where: str) -> bytes:
    key = text.strip()
    if len(key) < CHARACTERS_MIN:
        raise StartupFailed(f"the cluster key in {where} has less than {CHARACTERS_MIN} characters")
    return sha256(key.encode()).digest()
