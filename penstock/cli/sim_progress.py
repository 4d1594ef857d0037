"""How far a simulation is, on standard error: a bar on a terminal, else a line now and then."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_FIRST_AFTER_S = 2.0
_LINE_EVERY_S = 10.0
_DRAW_EVERY_S = 0.1


class Progress:
    """Shows simulated time against `end_s`; silent for what is over within two seconds."""

    def __init__(self, end_s: float, label: str = "simulating") -> None:
        self._end_s = max(end_s, 1e-9)
        self._label = label
        self._rich: RichProgress | None = None
        self._began_s = self._last_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def advance(self, now_s: float, num_arrived: int, num_ended: int) -> None:
        """Say that the simulation has come to `now_s`."""
        real_s = time.monotonic()
        is_early = real_s - self._began_s < _FIRST_AFTER_S
        interval_s = _DRAW_EVERY_S if sys.stderr.isatty() else _LINE_EVERY_S
        if is_early or real_s - self._last_s < interval_s:
            return
        self._last_s = real_s
        text = f"{now_s:,.0f} s, {num_arrived:,} arrived, {num_ended:,} answered"
        if sys.stderr.isatty():
            self._draw(now_s, text)
        else:
            print(f"penstock sim: {self._label}: {text}", file=sys.stderr, flush=True)

    def _draw(self, now_s: float, text: str) -> None:
        if self._rich is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._rich = RichProgress(
                TextColumn(self._label),
                BarColumn(bar_width=30),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._rich.start()
            self._task = self._rich.add_task(text, total=1.0)
        self._rich.update(self._task, description=text, completed=min(now_s / self._end_s, 1.0))
