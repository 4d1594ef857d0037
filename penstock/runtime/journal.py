"""`open_journal`: a decision log that goes to a file, one JSON line per decision."""

import atexit
from pathlib import Path

from penstock.core.errors import StartupFailed
from penstock.core.node import DecisionLog

KEPT_IN_MEMORY = 1000


def open_journal(path: str | None, suffix: str = "") -> DecisionLog | None:
    """Return a log that writes to `path` with `suffix` behind it, or None without a path.

    Lines are written as they come, so that a killed process leaves its last decision.

    Raises: `StartupFailed` when the file cannot be made.
    """
    if path is None:
        return None
    try:
        file = Path(path + suffix).open("wb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise StartupFailed(f"--decision-log {path}: {error.strerror}") from error
    atexit.register(file.close)

    def write(line: bytes) -> None:
        file.write(line)

    return DecisionLog(limit=KEPT_IN_MEMORY, sink=write)
