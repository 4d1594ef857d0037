"""What a person at the terminal sees of a server: progress, what came up, and nothing more.

On a terminal with rich's means, otherwise as plain lines that a log file can take. Everything goes
to stderr: a server's standard output belongs to nobody.
"""

import logging
import sys
from typing import TYPE_CHECKING

from penstock.core.descriptors import WorkerInfo
from penstock.core.types import MIB, Role
from penstock.runtime.instant import DESCRIPTION as NO_MODEL
from penstock.runtime.settings import ModelFacts

if TYPE_CHECKING:
    from rich.progress import Progress


class ServeConsole:
    """The voice of `penstock serve`. `transport` is what was asked for."""

    def __init__(self, transport: str = "auto") -> None:
        self._transport = transport
        self._is_terminal = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._last_stage = ""

    def begin(self, model: str) -> None:
        """Say what is being loaded."""
        if not self._is_terminal:
            _say(f"loading {model}")
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("[bold]{task.fields[model]}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task("starting", total=1.0, model=model)

    def advance(self, stage: str, fraction: float) -> None:
        """Show how far the loading is."""
        if self._progress is not None:
            self._progress.update(self._task, description=stage, completed=fraction)
        elif stage != self._last_stage:
            _say(stage)
        self._last_stage = stage

    def end_progress(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def show_cluster(
        self, address: str, name: str, model: ModelFacts, workers: list[WorkerInfo], seconds: float
    ) -> None:
        """Show what came up and how to use it."""
        self.end_progress()
        facts = [
            ("model", f"{name}, up to {model.max_model_len} tokens{_limit_note(model)}"),
            ("engine", model.description),
            ("KV cache", _kv_line(model)),
            *([("KV tiers", model.tiers)] if model.tiers else []),
            *(("KV codec", note) for note in model.codec_notes),
            ("transport", _transport_line(workers, self._transport)),
            ("address", address),
        ]
        if self._is_terminal:
            _show_table(facts, workers)
        else:
            for info in workers:
                _say(
                    f"worker {info.worker_id}: {info.role.value}, pid {info.pid}, "
                    f"KV for {info.capacity_tokens} tokens"
                )
            for key, value in facts:
                _say(f"{key}: {value}")
        if model.description == NO_MODEL:
            _say(f"WARNING: {NO_MODEL}")
        _say(f"ready after {seconds:.1f} s; try:\n{_curl_line(address, name)}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.end_progress()
        _say(text)


def set_up_logging(*, is_logging_requests: bool) -> None:
    """Send warnings, and one line per request if asked for, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Who comes and goes by itself is news to whoever sits at this terminal.
    logging.getLogger("penstock.runtime.membership").setLevel(logging.INFO)
    logging.getLogger("penstock.runtime.local").setLevel(logging.INFO)
    if is_logging_requests:
        logging.getLogger("penstock.requests").setLevel(logging.INFO)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _limit_note(model: ModelFacts) -> str:
    """Say so when it is the KV cache that limits a sequence."""
    if model.layout is None or model.max_model_len < model.layout.capacity_tokens(model.num_blocks):
        return ""
    return ", as many as its KV cache holds: --kv-cache-memory sets that"


def _kv_line(model: ModelFacts) -> str:
    if model.layout is None:
        return "none here: all workers are on other hosts"
    sizes = model.layout.block_bytes
    total = sum(count * size for count, size in zip(model.num_blocks, sizes, strict=True))
    return (
        f"{total / MIB:.0f} MiB per worker at most, blocks of {model.layout.block_size} tokens, "
        f"{model.layout.token_bytes} bytes per token, {model.layout.dtype}"
    )


def _transport_line(workers: list[WorkerInfo], asked: str) -> str:
    """Say how KV blocks get from each worker that hands off to each that takes over.

    What was asked for is taken or nothing is moved; otherwise it is what the memory is made for.
    """
    pairs = [
        f"{source.worker_id} → {taker.worker_id} {_kinds(source) if asked == 'auto' else asked}"
        for source in workers
        for taker in workers
        if source.role is Role.PREFILL and taker.role is Role.DECODE
    ]
    if not workers:
        return "none yet: workers of other hosts may join"
    if not pairs:
        return "none: every worker does both"
    return ", ".join(pairs[:8]) + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")


def _kinds(info: WorkerInfo) -> str:
    kinds = "/".join(dict.fromkeys(region.kind for region in info.regions))
    return f"shm ({kinds})"


def _show_table(facts: list[tuple[str, str]], workers: list[WorkerInfo]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("worker", "role"):
        table.add_column(column)
    for column in ("pid", "KV tokens", "sequences"):
        table.add_column(column, justify="right")
    for info in workers:
        table.add_row(
            info.worker_id,
            info.role.value,
            str(info.pid),
            f"{info.capacity_tokens:,}",
            str(info.max_num_seqs),
        )
    console.print(table)
    grid = Table.grid(padding=(0, 2))
    for key, value in facts:
        grid.add_row(f"[dim]{key}[/dim]", value)
    console.print(grid)


def _curl_line(address: str, name: str) -> str:
    body = (
        f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}], '
        '"max_tokens": 32}'
    )
    where = f"{address}/v1/chat/completions"
    if address.startswith("unix:"):
        where = (
            f"--unix-socket {address.removeprefix('unix:')} http://localhost/v1/chat/completions"
        )
    return f"  curl {where} -H 'Content-Type: application/json' -d '{body}'"
