"""Decode steps that were captured once and are replayed: one for each number of rows.

Owns which numbers of rows there are graphs for, and when one is captured. What is captured is a
function that reads and writes tensors that stay where they are, and depends on nothing that is not
in the graph's key: lengths, tables, tokens and parameters are read on the device, and among how
many programs attention divides a sequence follows from the key. `Capture` is the only part that
needs CUDA: `EagerReplay` runs the function itself, on any device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import torch

from penstock.engine.decoder import Decoder, DenseMlp

if TYPE_CHECKING:
    from penstock.engine.model import Forward, LoadedModel

Run = Callable[[], None]
WARM_UPS: Final = 2
"""Runs before a capture: they compile kernels and make workspaces, neither of which may happen
while a graph is captured.
"""
ROWS_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a captured step depends on: rows, padding included, and splits in each group."""

    num_rows: int
    num_splits: tuple[int, ...]


class Capture(Protocol):
    """Turns a function over fixed tensors into what repeats it."""

    def capture(self, run: Run) -> Run:
        """Return what does on the device what `run` does now; it may be run meanwhile."""


class EagerReplay:
    """Repeats a function by calling it: where there is no CUDA, or a model cannot be captured."""

    def capture(self, run: Run) -> Run:
        """Return the function."""
        return run


class CudaGraphs:
    """Captures CUDA graphs that share one pool of memory: only one of them runs at a time.

    **Not run on a GPU yet.** Made for `torch.cuda`; nothing else in the engine asks for CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Run) -> Run:
        """Warm up and capture on a stream of its own; other threads may use the device."""
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                run()
        now.wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()
        replay: Run = graph.replay
        return replay


def choose_capture(model: LoadedModel) -> Capture:
    """Return what captures a model's steps: CUDA graphs, unless it runs code that cannot be."""
    if model.device.is_cuda and is_capturable(model.forward):
        return CudaGraphs(model.device.torch_device)
    return EagerReplay()


def is_capturable(forward: Forward) -> bool:
    """Tell whether nothing of a forward waits for the device or asks it for a number.

    That is known of the flat decoder, but for blocks that stay as Hugging Face has them.
    """
    return isinstance(forward, Decoder) and all(
        isinstance(layer.mlp, DenseMlp) or layer.mlp.is_capturable for layer in forward.layers
    )


class DecodeGraphs:
    """Graphs by key, captured before the first step, or when one is first asked for."""

    def __init__(
        self,
        capture: Capture,
        make_run: Callable[[int], Run],
        key_of: Callable[[int], GraphKey],
        max_rows: int,
    ) -> None:
        """Take what runs a step of so many rows, and what else it depends on."""
        self.sizes = bucket_sizes(max_rows)
        self._capture, self._make_run, self._key_of = capture, make_run, key_of
        self._graphs: dict[GraphKey, Run] = {}

    def rows_for(self, num_rows: int) -> int | None:
        """Return the least number of rows with a graph that fits so many; None: there is none."""
        place = bisect_left(self.sizes, num_rows)
        return self.sizes[place] if place < len(self.sizes) else None

    def get(self, num_rows: int) -> Run:
        """Return what runs a step of exactly so many rows.

        Where it has to be captured first, the step may be run for that: no row may be live.
        """
        key = self._key_of(num_rows)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture.capture(self._make_run(num_rows))
        return graph

    def warm_up(self) -> None:
        """Capture all, the largest first: the others fit into the memory that it took."""
        for num_rows in reversed(self.sizes):
            self.get(num_rows)


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Return the numbers of rows that graphs are captured for: 1, 2, 4, then multiples of 8."""
    most = min(max_rows, ROWS_MAX)
    sizes = (1, 2, 4, *range(8, most + 8, 8))
    return sizes[: bisect_left(sizes, most) + 1]
