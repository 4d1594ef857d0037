"""`penstock doctor`: what this machine and installation can do, and what to do about the rest.

Runs the checks of `penstock/cli/checks/` one after the other and shows each finding as it comes.
Serving is not touched: a cluster may run meanwhile, though it shares the cores with what is
measured. With `--cluster` its workers are asked what the links between them are worth.
"""

import json
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Final

import msgspec
from msgspec import Struct

from penstock.cli.checks.finding import Check, Extent, Finding, State, failed
from penstock.cli.checks.gpu import check_gpu
from penstock.cli.checks.handoff import check_handoff, check_peer
from penstock.cli.checks.installation import (
    check_engine,
    check_key,
    check_model,
    check_python,
    check_transport_library,
)
from penstock.cli.checks.links import check_links
from penstock.cli.checks.machine import (
    check_cores,
    check_limits,
    check_memory,
    check_port,
    check_system,
)
from penstock.cli.checks.peer import Peer
from penstock.cli.client import ChatClient
from penstock.core.errors import PenstockError
from penstock.core.types import MIB
from penstock.core.version import VERSION
from penstock.transport.key import cluster_key

SECTIONS: Final[dict[str, dict[str, Check]]] = {
    "installation": {
        "versions": check_python,
        "the native transport": check_transport_library,
        "torch and the kernels (the first time they are compiled)": check_engine,
        "the built-in model": check_model,
        "the cluster key": check_key,
    },
    "machine": {
        "the system": check_system,
        "cores": check_cores,
        "memory": check_memory,
        "limits": check_limits,
        "the port": check_port,
    },
    "GPUs": {"driver, devices, and memory between two processes": check_gpu},
    "hand-off between two processes": {"transports": check_handoff},
}
QUICK: Final = Extent(is_quick=True, moved_bytes=16 * MIB, repetitions=3)
_COLOURS: Final = {State.OK: "32", State.WARNING: "33", State.FAILED: "31"}


class Report(Struct, kw_only=True):
    """All that was found, by section, in order. `seconds` is how long it took."""

    version: str = VERSION
    is_ok: bool = True
    seconds: float = 0.0
    sections: dict[str, list[Finding]]

    def count(self, state: State) -> int:
        """Return how many findings are in this state."""
        return sum(f.state is state for findings in self.sections.values() for f in findings)


def doctor(options: Namespace) -> int:
    """Examine and report; return 0, or 1 when something will keep Penstock from serving."""
    if options.listen:
        return listen(*options.listen)
    started = time.monotonic()
    voice = _Json() if options.json else _Page()
    report = Report(sections={})
    for section, checks in _sections(options).items():
        voice.begin(section)
        found = report.sections[section] = []
        for finding in _run(checks, QUICK if options.quick else Extent(), voice):
            found.append(finding)
            voice.show(finding)
    report.is_ok = not report.count(State.FAILED)
    report.seconds = round(time.monotonic() - started, 2)
    voice.end(report)
    return 0 if report.is_ok else 1


def listen(host: str, port: int) -> int:
    """Be the other side of `penstock doctor HOST:PORT` until Ctrl-C."""
    with Peer(cluster_key(), host, port) as peer, suppress(KeyboardInterrupt):
        shown = "THIS-HOST" if host in ("0.0.0.0", "::") else host
        print("listening; on the other host, with the same cluster key, run")
        print(f"  penstock doctor {shown}:{peer.port}", flush=True)
        threading.Event().wait()
    return 0


def _sections(options: Namespace) -> dict[str, dict[str, Check]]:
    """Return what to look at: everything here, the links of a cluster that runs, or the way to each
    peer that is named.
    """
    if options.cluster:
        client = ChatClient(options.cluster, options.api_key)
        checks: dict[str, Check] = {"every pair of workers": partial(check_links, client=client)}
        return {f"hand-off between the workers of {client.url}": checks}
    if not options.peers:
        return SECTIONS
    return {
        f"hand-off with {host}:{port}": {"transports": partial(check_peer, host=host, port=port)}
        for host, port in options.peers
    }


def _run(checks: dict[str, Check], extent: Extent, voice: "_Voice") -> Iterator[Finding]:
    for title, check in checks.items():
        voice.work(title)
        try:
            yield from check(extent)
        except (OSError, PenstockError) as error:
            yield failed(title, f"could not be looked at: {error}", "mend that, then ask again")


class _Voice:
    """Progress on stderr where that is a terminal: what is being looked at, until it is known."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()

    def work(self, title: str) -> None:
        """Say what is being looked at."""
        if self._is_shown:
            print(
                f"\r\x1b[K\x1b[2mlooking at {title} ...\x1b[0m", end="", file=sys.stderr, flush=True
            )

    def begin(self, section: str) -> None:
        """Start a section."""

    def show(self, finding: Finding) -> None:
        """Take in a finding."""

    def end(self, report: Report) -> None:
        """Finish."""
        self._clear()

    def _clear(self) -> None:
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class _Json(_Voice):
    """Says everything at the end, for a script."""

    def end(self, report: Report) -> None:
        super().end(report)
        print(json.dumps(msgspec.to_builtins(report), indent=1, ensure_ascii=False))


class _Page(_Voice):
    """Shows each finding as it comes, for a person."""

    def __init__(self) -> None:
        super().__init__()
        self._is_colourful = sys.stdout.isatty()
        print(f"penstock {VERSION}")

    def begin(self, section: str) -> None:
        self._clear()
        print(f"\n{section}")

    def show(self, finding: Finding) -> None:
        self._clear()
        state = f"{finding.state.value:<8}"
        if self._is_colourful:
            state = f"\x1b[{_COLOURS[finding.state]}m{state}\x1b[0m"
        print(f"  {state}{finding.name:<22} {finding.said}", flush=True)
        if finding.advice:
            print(f"{'':10}{'':<22} → {finding.advice}", flush=True)

    def end(self, report: Report) -> None:
        super().end(report)
        failures, warnings = report.count(State.FAILED), report.count(State.WARNING)
        said = "everything is as it should be"
        if failures:
            said = f"{failures} failed; the next steps stand above"
        elif warnings:
            said = f"ready to serve; {warnings} warning{'s' if warnings > 1 else ''} above"
        print(f"\n{said} ({report.seconds:.1f} s)")
