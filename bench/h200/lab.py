"""Where measures run: a GPU, or the CPU where only the way through is walked; and how they time.

A measure is a function of a `Lab` that adds figures to the report under their names, or raises
`Absent` saying which part is not here, or `Wrong`. Times on a GPU are between events, over a queue
of launches that was filled while the device slept, so that no launch waits for the host; buffers
are rotated by the measures, so that nothing comes out of the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from report import Report

SLEEP_CYCLES = 6_000_000
"""About 3 ms at the clock of a Hopper: the time to fill a queue."""
L2_BYTES = 60 << 20
RUNS = 7


class Absent(Exception):
    """A part that a measure needs is not here; says which, and what would bring it."""


class Wrong(Exception):
    """What was computed is not what it has to be."""


class OutOfTime(Exception):
    """The deadline has passed; says before which figure."""


@dataclass
class Target:
    """What a figure is held to: at least, or at most."""

    value: float
    is_least: bool = True

    def is_met(self, found: float) -> bool:
        """Tell whether a figure reaches it."""
        return found >= self.value if self.is_least else found <= self.value


@dataclass
class Lab:
    """A device to measure on. `is_dry` asks for the smallest sizes, whose times mean nothing.

    `kept` is the file that everything is written into, `ends_at` the deadline by `time.time()`.
    """

    device: torch.device
    is_dry: bool
    report: Report
    kept: str
    ends_at: float

    @property
    def sections(self) -> dict[str, dict[str, object]]:
        """What became of each part so far, by name."""
        return self.report.extras.setdefault("sections", {})

    @property
    def time_left_s(self) -> float:
        """Seconds until the deadline."""
        return self.ends_at - time.time()

    @property
    def copy_bytes_per_s(self) -> float:
        """Bytes read and written a second by a plain copy, once it has been measured, else 0."""
        return self.report.figures.get("copy", 0.0) * 1e12

    @property
    def flops_per_s(self) -> float:
        """Operations a second of a large product in bfloat16, once it has been measured, else 0."""
        return self.report.figures.get("product", 0.0) * 1e12

    def note(self, name: str, outcome: str, reason: str = "", seconds: float = 0.0) -> None:
        """Note what became of a part, and write it down."""
        found = {"outcome": outcome, "reason": reason, "seconds": round(seconds, 1)}
        self.sections[name] = found
        self.report.keep(self.kept)

    @property
    def is_cuda(self) -> bool:
        """Tell whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def runs(self) -> int:
        """How often a figure is taken."""
        return 1 if self.is_dry else RUNS

    def pick(self, full: object, dry: object) -> object:
        """Return what is meant for a measurement, or for a walk through it."""
        return dry if self.is_dry else full

    def seconds(self, launch: Callable[[int], object], count: int) -> list[float]:
        """Return the seconds of one launch, from `count` of them in a row, several times.

        `launch(i)` gives the device the i-th; what it returns is dropped.
        """
        count = 1 if self.is_dry else count
        launch(0)
        self.wait()
        return [self._row(launch, count) / count for _ in range(self.runs)]

    def _row(self, launch: Callable[[int], object], count: int) -> float:
        if not self.is_cuda:
            started = time.perf_counter()
            for i in range(count):
                launch(i)
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        for i in range(count):
            launch(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def add(
        self,
        key: str,
        runs: list[float],
        unit: str,
        *,
        floor: float | None = None,
        target: Target | None = None,
    ) -> float:
        """Note a figure and write it down; return its median.

        Raises: `OutOfTime` behind the deadline; the figure is kept.
        """
        value = self.report.add(key, runs, unit)
        row: dict[str, object] = {"key": key, "value": value, "unit": unit, "floor": floor}
        row["target"] = None if target is None else target.value
        if target is not None:
            row |= {"is_least": target.is_least, "is_met": target.is_met(value)}
        self.report.extras.setdefault("rows", []).append(row)
        self.report.keep(self.kept)
        if self.time_left_s < 0:
            raise OutOfTime(f"the deadline passed while {key} was measured")
        return value

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Return random numbers: zeros would take less power, and be quicker."""
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def copies(self, num_bytes: int, most: int = 16) -> int:
        """Return how many buffers to rotate so that together they are past the cache."""
        return 1 if self.is_dry else max(2, min(most, 1 + 3 * L2_BYTES // max(1, num_bytes)))


@dataclass(frozen=True)
class Measure:
    """A named part of the run.

    It is begun where `least_s` are left, which is about what it takes on an H200 (an estimate), and
    ended with its process after `limit_s`: then it hangs.
    """

    name: str
    run: Callable[[Lab], None]
    least_s: float = 5.0
    limit_s: float = 90.0
