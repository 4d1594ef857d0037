"""Other processes of checks: with our code, ended with the check, heard within a deadline."""

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from penstock.core.errors import StartupFailed

DEADLINE_S: Final = 30.0


@contextmanager
def running(
    module: str, *arguments: object, words: bytes = b"", **environment: str
) -> Iterator[Callable[[], bytes]]:
    """Run a module of ours, tell it `words`, and end it afterwards; give what hears its first line.

    That raises `StartupFailed` with its last words when there is none in time.
    """
    source = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile() as last_words:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=last_words,
            env=os.environ | {"PYTHONPATH": path} | environment,
        )
        try:
            assert process.stdin is not None
            process.stdin.write(words)
            process.stdin.flush()
            yield lambda: _first_line(process, last_words)
        finally:
            process.kill()
            process.communicate()


def _first_line(process: "subprocess.Popen[bytes]", last_words: IO[bytes]) -> bytes:
    assert process.stdout is not None
    deadline, line = time.monotonic() + DEADLINE_S, b""
    while not line.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        is_there, _, _ = select.select([process.stdout], [], [], left)
        chunk = os.read(process.stdout.fileno(), 65536) if is_there else b""
        if not chunk:
            last_words.seek(0)
            said = last_words.read().decode(errors="replace").strip().splitlines()
            raise StartupFailed(said[-1] if said else f"nothing within {DEADLINE_S:.0f} s")
        line += chunk
    return line
