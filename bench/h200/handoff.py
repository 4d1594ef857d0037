"""A prompt's KV from one process into another on one GPU, by CUDA IPC: in one copy, in runs, block
by block, and layer by layer as a layer-major pool makes it cross.

Source: FlowKV (arXiv 2504.03775), whose comparison this is.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch

from h200.device_memory import allocate, as_fragments, double_library, make_driver
from h200.lab import Lab, Measure, Target, Wrong
from penstock.core.descriptors import RegionDescriptor
from penstock.transfer.plan import SpanArray, cut
from penstock.transfer.region import PeerMemory
from penstock.transport.cuda_ipc import CudaIpc, CudaRegion, MappedCudaPool

NUM_BLOCKS, LAYERS, FRAGMENT_BYTES = 256, 32, 16 * 8 * 128 * 2
"""4096 tokens of Llama-3.1-8B in blocks of 16: of keys or values of a layer a block has 32 KiB."""
RUN_BLOCKS = 16
PULL_TB_PER_S = 1.0
FEWER_CALLS = 20.0


@contextmanager
def peers(lab: Lab) -> Iterator[tuple[CudaRegion, torch.Tensor, list[MappedCudaPool]]]:
    """Yield our pool, and that of another process: by blocks, and by fragments."""
    library = "" if lab.is_cuda else double_library()
    num_blocks, layers, fragment = lab.pick(
        (NUM_BLOCKS, LAYERS, FRAGMENT_BYTES), (RUN_BLOCKS, 2, 64)
    )
    block_bytes = 2 * layers * fragment
    program = str(Path(__file__).parent / "handoff_owner.py")
    sizes = map(str, (2 * num_blocks, block_bytes, fragment))
    owner = subprocess.Popen(
        [sys.executable, program, library, *sizes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    way = CudaIpc(make_driver(library), 0)
    try:
        assert owner.stdout is not None
        line = owner.stdout.readline()
        memory = PeerMemory("p", 1, msgspec.json.decode(line, type=tuple[RegionDescriptor, ...]))
        region, blocks = allocate(library, 2 * num_blocks, block_bytes)
        blocks[:] = 255
        lab.wait()
        yield region, blocks, [way.open(memory, 0), way.open(memory, 1)]
    finally:
        way.close()
        owner.kill()
        owner.communicate()


def plans(num_blocks: int) -> dict[str, SpanArray]:
    """Return how blocks of one pool lie in another: the same ones in one run, in some, in none."""
    rng = np.random.default_rng(0)
    everything = np.arange(num_blocks)
    runs = everything.reshape(-1, min(RUN_BLOCKS, num_blocks))
    return {
        "one_copy": cut(everything, everything),
        "runs": cut(rng.permutation(runs).reshape(-1), everything),
        "blocks": cut(rng.permutation(2 * num_blocks)[:num_blocks], everything),
    }


def layer_wise(num_blocks: int, fragments: int) -> SpanArray:
    """Return the spans of a layer-major pool: each block crosses in as many pieces as it has."""
    rng = np.random.default_rng(1)
    wanted = (rng.permutation(2 * num_blocks)[:num_blocks, None], np.arange(num_blocks)[:, None])
    source, target = (blocks * fragments + np.arange(fragments) for blocks in wanted)
    spans = np.stack([source.T.reshape(-1), target.T.reshape(-1), np.ones(source.size, np.int64)])
    return np.ascontiguousarray(spans.T, np.int64)


def check(lab: Lab) -> None:
    """Compare what has landed with what is there."""
    with peers(lab) as (region, blocks, sources):
        num_blocks = region.num_blocks // 2
        fragments = sources[1].num_blocks // sources[0].num_blocks
        cases = [(sources[0], region, plan) for plan in plans(num_blocks).values()]
        cases.append(
            (
                sources[1],
                as_fragments(region, sources[1].block_bytes),
                layer_wise(num_blocks, fragments),
            )
        )
        for source, into, spans in cases:
            blocks[:] = 255
            lab.wait()
            source.pull(into, spans)
            scale = into.num_blocks // region.num_blocks
            wanted = np.full((into.num_blocks,), 255)
            for start, to, count in spans.tolist():
                wanted[to : to + count] = np.arange(start, start + count) // scale % 251
            found = blocks.view(into.num_blocks, -1).cpu().numpy()
            if not (found == wanted[:, None]).all():
                raise Wrong(f"blocks of {len(spans)} spans are not the owner's")


def rates(lab: Lab) -> None:
    """Time each way for the same hand-off; bytes of KV a second."""
    with peers(lab) as (region, _, sources):
        num_blocks = region.num_blocks // 2
        num_bytes = num_blocks * region.block_bytes
        seconds = {}
        for name, spans in plans(num_blocks).items():
            seconds[name] = timed(lab, sources[0], region, spans)
        fragments = sources[1].num_blocks // sources[0].num_blocks
        pieces = as_fragments(region, sources[1].block_bytes)
        seconds["layer_wise"] = timed(lab, sources[1], pieces, layer_wise(num_blocks, fragments))
        # A copy reads and writes: its payload is half of what memory does.
        ceiling = lab.copy_bytes_per_s / 2 / 1e12 or None
        for name, found in seconds.items():
            target = Target(PULL_TB_PER_S) if name in ("one_copy", "runs") else None
            lab.add(
                f"ipc_pull_{name}",
                [num_bytes / s / 1e12 for s in found],
                "TB/s",
                floor=ceiling,
                target=target,
            )
            lab.add(f"ipc_pull_{name}_time", [1e3 * s for s in found], "ms")
        pairs = zip(seconds["layer_wise"], seconds["one_copy"], strict=True)
        ratios = [slow / fast for slow, fast in pairs]
        lab.add("one_copy_over_layer_wise", ratios, "x", target=Target(FEWER_CALLS))


def timed(lab: Lab, source: MappedCudaPool, into: CudaRegion, spans: SpanArray) -> list[float]:
    """Return the seconds from the call until everything has landed, as a worker waits for it."""
    source.pull(into, spans)
    found = []
    for _ in range(lab.runs):
        started = time.perf_counter()
        source.pull(into, spans)
        found.append(time.perf_counter() - started)
    return found


CHECKS = (Measure("hand-off by CUDA IPC is right", check),)
MEASURES = (Measure("hand-off by CUDA IPC", rates),)
