"""What every benchmark prints: the machine, min/median/max of each figure, one JSON line, and a
file to keep.

Used by the scripts beside it; run those, not this.
"""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """Return the processor's name, with what matters for bf16."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    flags = fields.get("flags", "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({wide[-1] if wide else 'no avx2'})"


def machine() -> dict[str, object]:
    """Return what the figures depend on besides the code."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        ).stdout.strip()
    except OSError:  # there is no git where only a copy of the tree was brought
        commit = ""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "commit": commit or "unknown",
        # Where a file lies is this machine's affair; which one it is matters.
        "command": " ".join(Path(word).name if "/" in word else word for word in sys.argv),
    }


class Report:
    """Collects figures while a benchmark runs; `finish` prints and keeps them.

    From its making on the process ends on SIGTERM as on Ctrl-C: the servers it has started with it.
    """

    def __init__(self, name: str, *, settings: dict[str, object] | None = None) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.name = name
        self.settings = settings or {}
        self.figures: dict[str, float] = {}
        self.spreads: dict[str, dict[str, float]] = {}
        self.extras: dict[str, Any] = {}
        """What a benchmark keeps beside figures, each under a key of its own."""
        self.machine = facts = machine()
        print(f"{name}: {facts['cpu']}, {facts['cores']} cores, commit {facts['commit']}")
        for key, value in self.settings.items():
            print(f"  {key}: {value}")

    def add(self, key: str, runs: Sequence[float], unit: str = "", *, note: str = "") -> float:
        """Note the runs of one figure; print them; return the median."""
        median = statistics.median(runs)
        self.figures[key] = median
        self.spreads[key] = {
            "min": min(runs),
            "median": median,
            "max": max(runs),
            "runs": len(runs),
        }
        print(
            f"  {key:<44} {min(runs):>10.4g} {median:>10.4g} {max(runs):>10.4g}  {unit:<10}"
            f" n={len(runs)} {note}",
            flush=True,
        )
        return median

    def resume(self, output: str | None = None) -> None:
        """Take in the results that are kept already, of the same machine and settings."""
        path = Path(output) if output else RESULTS / f"{self.name}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.figures.update(kept["figures"])
            self.spreads.update(kept["spreads"])
            known = {"name", "machine", "settings", "figures", "spreads"}
            self.extras.update({key: kept[key] for key in kept.keys() - known})

    def keep(self, output: str | None = None) -> Path:
        """Write the results so far into their file; return where."""
        path = Path(output) if output else RESULTS / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "name": self.name,
            "machine": self.machine,
            "settings": self.settings,
            "figures": self.figures,
            "spreads": self.spreads,
            **self.extras,
        }
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return path

    def finish(self, output: str | None = None) -> None:
        """Keep the results and print the one JSON line that a script reads."""
        print(f"  kept in {self.keep(output)}")
        print(json.dumps({key: round(value, 6) for key, value in self.figures.items()}))
