"""Explanations out of a decision log: a controller is given the same events again, and asked.

A core is a function of its events and their times, so what it says now is what the one that served
would have said. Called by `penstock explain --log`.
"""

import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from penstock.control.controller import Controller
from penstock.core.errors import BadRequest, UnknownRequest
from penstock.core.events import Configured, Event
from penstock.core.explain import Explanation
from penstock.core.messages import Submit
from penstock.core.node import DecisionLog, LogEntry
from penstock.core.types import RequestId

SHOWN_IDS: Final = 3
PROGRESS_EVERY_S: Final = 2.0


class LogExplainer:
    """Goes through a log once. `num_differing` counts decisions about the request that this version
    would not make: then what it explains is not what happened.
    """

    def __init__(self, path: str, name: str) -> None:
        self.num_differing = 0
        self._path = path
        self._name = name
        # As the server makes ids: the kind, a client's own id with a draw behind it, the choice.
        self._pattern = re.compile(
            f"((chatcmpl|cmpl)-)?{re.escape(name)}(-[0-9a-f]{{8}})?(-[0-9]+)?"
        )
        self._found: dict[RequestId, Explanation | None] = {}
        self._latest: deque[RequestId] = deque(maxlen=SHOWN_IDS)

    def explain(self) -> list[Explanation]:
        """Return what is known of every request of that name, in order of coming.

        Raises: `BadRequest` when it is no controller's log, `UnknownRequest` when nobody of that
        name was given to a worker.
        """
        lines = self._lines()
        controller = self._controller(next(lines, b""))
        mark = self._name.encode()
        for number, line in enumerate(lines, 2):
            entry, event = self._parse(line, number)
            commands = controller.handle(event, entry.now_ns)
            if isinstance(event, Submit):
                self._note(event.request.request_id)
            if mark not in line:
                continue
            self._compare(entry, DecisionLog.entry(entry.now_ns, event, commands))
            for request_id, known in self._found.items():
                self._found[request_id] = controller.explain(request_id) or known
        return self._answer()

    def _lines(self) -> Iterator[bytes]:
        """Yield whole lines; say how far that is when it takes long."""
        path, num_read, said_s = Path(self._path), 0, time.monotonic()
        try:
            size = max(path.stat().st_size, 1)
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        return  # the process was killed while it wrote its last line
                    num_read += len(line)
                    if time.monotonic() - said_s > PROGRESS_EVERY_S:
                        said_s = time.monotonic()
                        print(f"reading {path}: {num_read / size:.0%}", file=sys.stderr)
                    yield line
        except OSError as error:
            raise BadRequest(f"--log {path}: {error.strerror}") from error

    def _controller(self, line: bytes) -> Controller:
        _, event = self._parse(line, 1)
        if not isinstance(event, Configured):
            raise BadRequest(
                f"--log {self._path} does not begin with a controller's settings: it must be the "
                "file named by --decision-log itself, not one of the workers' beside it"
            )
        return Controller(event.config)

    def _parse(self, line: bytes, number: int) -> tuple[LogEntry, Event]:
        try:
            entry = msgspec.json.decode(line, type=LogEntry)
            event: Event = msgspec.convert(entry.event, Event, str_keys=True)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(f"--log {self._path}:{number} is no decision: {error}") from error
        return entry, event

    def _note(self, request_id: RequestId) -> None:
        self._latest.append(request_id)
        if self._pattern.fullmatch(request_id):
            self._found[request_id] = None

    def _compare(self, recorded: LogEntry, again: LogEntry) -> None:
        encode = msgspec.json.encode
        self.num_differing += encode(recorded.commands) != encode(again.commands)

    def _answer(self) -> list[Explanation]:
        known = [explanation for explanation in self._found.values() if explanation is not None]
        if known:
            return known
        if self._found:
            raise UnknownRequest(f"{self._name} was never given to a worker")
        latest = ", ".join(self._latest) or "none"
        raise UnknownRequest(f"{self._name} is not in {self._path}; its last requests: {latest}")
