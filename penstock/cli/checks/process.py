"""The first line of a process that a check has started, or its last words."""

import os
import select
import subprocess
import time
from typing import IO, Final

from penstock.core.errors import StartupFailed

DEADLINE_S: Final = 30.0


def first_line(process: "subprocess.Popen[bytes]", words: IO[bytes]) -> bytes:
    """Return it, within a deadline. `words` is where its stderr goes.

    Raises: `StartupFailed` with its last words.
    """
    assert process.stdout is not None
    deadline, line = time.monotonic() + DEADLINE_S, b""
    while not line.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        is_there, _, _ = select.select([process.stdout], [], [], left)
        chunk = os.read(process.stdout.fileno(), 65536) if is_there else b""
        if not chunk:
            words.seek(0)
            said = words.read().decode(errors="replace").strip().splitlines()
            raise StartupFailed(said[-1] if said else f"nothing within {DEADLINE_S:.0f} s")
        line += chunk
    return line
