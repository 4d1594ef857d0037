"""The host process of a local cluster, as `HostProcess.spawn` starts it: `python -m` this module.

The composition root of a worker: worker core, model or instant executor, shared memory pools and
block mover are put together here. Torch is imported while the model is loaded, and not at all for
the instant executor.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from penstock.cli.tiers import (
    check_tiers,
    choose_codecs,
    describe_tiers,
    open_tiers,
    sibling_tiers,
    tier_configs,
    tier_regions,
    with_tiers,
)
from penstock.core.block import KVLayout
from penstock.core.config import WorkerConfig
from penstock.core.errors import StartupFailed
from penstock.core.step import Sampled, Step
from penstock.core.types import GIB, MIB, RequestId
from penstock.runtime.host import RunWorker, run_host
from penstock.runtime.instant import DESCRIPTION, InstantExecutor, instant_layout
from penstock.runtime.link import WorkerSpec
from penstock.runtime.processes import available_bytes, usable_cores
from penstock.runtime.settings import (
    AUTO,
    INSTANT_EXECUTOR,
    ClusterSettings,
    ModelFacts,
    NetworkSettings,
)
from penstock.runtime.worker import WorkerParts, WorkerPlace, run_worker
from penstock.transfer.generation import COUNTER_BYTES, counters
from penstock.transfer.region import Region
from penstock.transport.key import cluster_key
from penstock.transport.mover import BlockMover
from penstock.transport.native.library import load_library
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_agent import MISSING, is_installed, is_worthwhile
from penstock.transport.nixl_owner import NixlOwner
from penstock.transport.probe import Prober
from penstock.transport.shm import SharedMemory, SharedPool
from penstock.transport.tcp import Tcp
from penstock.transport.tcp_owner import TcpOwner
from penstock.transport.verify import digests_of, no_digests, verified
from penstock.transport.way import Way
from penstock.worker.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.executor import ModelExecutor
    from penstock.engine.kv_access import RecordedExecutor
    from penstock.engine.model import LoadedModel

KV_SHARE = 0.5
"""Part of the free memory that the KV caches of all workers may take when nobody says."""
KV_BYTES_MIN = 64 * MIB
POPULATED_BYTES = 2 * GIB
"""Part of a KV cache whose pages are taken before a request touches them."""
POPULATED_PIECE_BYTES = 32 * MIB

Execute = Callable[[Step], tuple[Sampled, ...]]
Progress = Callable[[str, float], None]
MakeExecute = Callable[[tuple[Region, ...], int], tuple[Execute, Callable[[], None]]]
"""From a worker's pools and its number of threads to what runs its steps, and what its thread does
first.
"""


def load(settings: ClusterSettings, progress: Progress) -> tuple[ModelFacts, RunWorker]:
    """Load what workers execute; return its facts and what a worker does.

    Raises: `StartupFailed` saying what to change.
    """
    if settings.transport == Nixl.kind and not is_installed():
        raise StartupFailed(f"--transport nixl: {MISSING}")
    load_library()  # compiled now and not in some request's hand-off; workers share it
    if settings.executor == INSTANT_EXECUTOR:
        find = _load_instant
    else:
        find = _load_model if settings.num_workers else _describe_model
    facts, make_execute = find(settings, progress)
    check_tiers(settings, facts.layout, facts.tier_codecs)
    told = describe_tiers(settings, facts.layout, facts.tier_codecs)
    facts = msgspec.structs.replace(facts, tiers=told)
    return facts, partial(_work, settings, facts, make_execute)


def _work(
    settings: ClusterSettings,
    facts: ModelFacts,
    make_execute: MakeExecute,
    spec: WorkerSpec,
    place: WorkerPlace,
) -> None:
    """Be a worker."""
    threads = settings.threads or max(1, usable_cores() // settings.most_workers)
    if settings.is_pinned:
        _pin(spec.index, threads)
    layout = facts.layout
    assert layout is not None, facts
    is_instant = settings.executor == INSTANT_EXECUTOR
    pools = tuple(map(SharedPool, facts.num_blocks, layout.block_bytes))
    regions = tuple(pool.region for pool in pools)
    shared_counters = tuple(SharedPool(count, COUNTER_BYTES) for count in facts.num_blocks)
    shared = (*pools, *shared_counters)
    Thread(target=_populate, args=(pools,), name="populate", daemon=True).start()
    execute, prepare = make_execute(regions, threads)
    ways, owners = _ways(settings, spec.epoch, tuple(pool.region for pool in shared))
    mover = BlockMover(layout, regions, ways, place.time.now_ns)
    tiers = open_tiers(settings, spec, layout, facts.tier_codecs)
    siblings = sibling_tiers(spec, facts)
    execute_move = verified(mover.execute, regions)
    move = with_tiers(execute_move, tiers, regions, place.time.now_ns, siblings)
    config = WorkerConfig(
        worker_id=spec.worker_id,
        role=spec.role,
        epoch=spec.epoch,
        layout=layout,
        num_blocks=facts.num_blocks,
        max_model_len=facts.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        eos_token_ids=facts.eos_token_ids,
        is_prefix_caching=settings.is_prefix_caching,
        handoff=settings.handoff,
        tiers=tier_configs(tiers, settings.kv_eviction),
        host=place.host,
    )
    core = Worker(config, tuple(counters(pool.region.blocks) for pool in shared_counters))
    parts = WorkerParts(
        core=core,
        execute=execute,
        # What the instant executor leaves in its blocks means nothing: there is nothing to verify.
        digest=no_digests if is_instant else partial(digests_of, regions=regions),
        prepare=prepare,
        move=move,
        peers=(mover, siblings),
        regions=tuple(pool.descriptor for pool in shared),
        endpoints=tuple(owner.endpoint for owner in owners),
        engine=facts.description,
        tiers=tier_regions(tiers),
        probe=_prober(settings, ways).probe,
        requests=partial(_requests, core),
    )
    run_worker(config, parts, place)


def _requests(core: Worker) -> list[RequestId]:
    return [*core.sequences, *(entry.session.request_id for entry in core.pulls.pending)]


def _ways(
    settings: ClusterSettings, epoch: int, regions: tuple[Region, ...]
) -> tuple[list[Way], list[NixlOwner | TcpOwner]]:
    """Return how this worker reads its peers, and by whom it is read itself.

    Nothing listens unless it is asked for or other hosts take part: workers of one host map each
    other's pools.
    """
    network = settings.network or NetworkSettings(host="127.0.0.1")
    wanted = settings.transport
    if wanted == SharedMemory.kind or (wanted == AUTO and settings.network is None):
        return [SharedMemory()], []
    ways: list[Way] = [SharedMemory()] if wanted == AUTO else []
    owners: list[NixlOwner | TcpOwner] = []
    if wanted == Nixl.kind or (wanted == AUTO and is_worthwhile()):
        ways.append(Nixl())
        owners.append(NixlOwner(epoch))
    if wanted != Nixl.kind:
        key = cluster_key(Path(network.key_file) if network.key_file else None)
        ways.append(Tcp(key))
        owners.append(
            TcpOwner(epoch, key, host=network.host, advertised=network.advertised or None)
        )
    for owner in owners:
        for region in regions:
            owner.add(region)
    return ways, owners


def _prober(settings: ClusterSettings, used: list[Way]) -> Prober:
    """Return what tries every transport there is to a peer, whichever of them are in use."""
    key_file = settings.network.key_file if settings.network else ""
    made: dict[str, Callable[[], Way]] = {
        SharedMemory.kind: SharedMemory,
        Nixl.kind: Nixl,
        Tcp.kind: lambda: Tcp(cluster_key(Path(key_file) if key_file else None)),
    }
    return Prober(made, [way.kind for way in used])


def _populate(pools: tuple[SharedPool, ...]) -> None:
    """Take the pages that the first requests will use, on whatever core has nothing else to do."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    for pool in pools:
        piece = max(1, POPULATED_PIECE_BYTES // pool.region.block_bytes)
        wanted = min(
            POPULATED_BYTES // len(pools) // pool.region.block_bytes, pool.region.num_blocks
        )
        for first in range(0, wanted, piece):
            pool.populate(first, piece)


def _pin(index: int, threads: int) -> None:
    """Keep worker `index` on cores of its own; when there are too few, they are shared in turn."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(
        0, {cores[(index * threads + offset) % len(cores)] for offset in range(threads)}
    )


# --------------------------------------------------------------------------------------- the model


def _load_model(settings: ClusterSettings, progress: Progress) -> tuple[ModelFacts, MakeExecute]:
    progress("importing torch", 0.0)
    # What workers need is imported here as well: they find it in memory when they are forked.
    from penstock.engine.executor import ModelExecutor
    from penstock.engine.kv_access import recorded_executor
    from penstock.engine.loading import load_model
    from penstock.engine.weights import find_folder

    engine = settings.engine
    if not Path(engine.model).expanduser().is_dir():
        progress("fetching the model", 0.0)
    folder = find_folder(engine)
    model = load_model(engine, progress)
    layout, num_blocks = model.layout(engine.block_size), _num_blocks(model, settings)
    check_tiers(settings, layout)
    chosen = choose_codecs(settings, model, folder, progress)
    facts = ModelFacts(
        folder=str(folder),
        layout=layout,
        num_blocks=num_blocks,
        # A sequence that outgrows the cache of its worker could neither go on nor make room.
        max_model_len=min(model.max_model_len, layout.capacity_tokens(num_blocks)),
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        description=model.description,
        tier_codecs=chosen.codecs,
        codec_notes=chosen.notes,
    )
    path = settings.kv_access_log
    if path is not None:
        return facts, partial(_bind_model, partial(recorded_executor, model, path), layout)
    return facts, partial(_bind_model, partial(ModelExecutor, model), layout)


def _describe_model(
    settings: ClusterSettings, progress: Progress
) -> tuple[ModelFacts, MakeExecute]:
    """Find out what the front must know where no worker will be forked: no weights are read."""
    progress("reading the model's config", 0.0)
    from penstock.engine.loading import describe_model

    model = describe_model(settings.engine)
    facts = ModelFacts(
        folder=str(model.folder),
        layout=None,
        num_blocks=(),
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        description="on other hosts",
    )
    return facts, _bind_nothing


def _bind_nothing(
    _regions: tuple[Region, ...], _threads: int
) -> tuple[Execute, Callable[[], None]]:
    raise AssertionError("a worker was forked without a model")


def _num_blocks(model: "LoadedModel", settings: ClusterSettings) -> tuple[int, ...]:
    """Size the KV cache of each worker, by what was asked for or else by what is free and of use.

    Raises: `StartupFailed` when what is free is not enough.
    """
    from penstock.engine.model import num_blocks

    layout = model.layout(settings.engine.block_size)
    kv_bytes, most = settings.engine.kv_cache_bytes, settings.most_workers
    if kv_bytes is None:
        useful = settings.max_num_seqs * model.max_model_len * layout.token_bytes
        share = int(available_bytes() * KV_SHARE) // most
        kv_bytes = min(share, max(useful, KV_BYTES_MIN))
    elif kv_bytes * most > available_bytes():
        raise StartupFailed(
            f"--kv-cache-memory: {most} workers with {kv_bytes / MIB:.0f} MiB each "
            f"need more than the {available_bytes() / MIB:.0f} MiB that are free"
        )
    return num_blocks(
        layout,
        kv_bytes,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )


def _bind_model(
    make_executor: "Callable[[tuple[Tensor, ...]], ModelExecutor | RecordedExecutor]",
    layout: KVLayout,
    regions: tuple[Region, ...],
    threads: int,
) -> tuple[Execute, Callable[[], None]]:
    import torch

    executor = make_executor(tuple(_tensors(regions, layout)))

    def prepare() -> None:
        # OpenMP keeps the number of threads per thread that asks, so the asking one sets it.
        torch.set_num_threads(threads)

    return torch.inference_mode()(executor.execute), prepare


def _tensors(regions: tuple[Region, ...], layout: KVLayout) -> "list[Tensor]":
    """View each pool as [num_blocks, layers, 2, block_size, num_kv_heads, head_dim]."""
    import torch

    dtype = getattr(torch, layout.dtype)
    inner = (2, layout.block_size, layout.num_kv_heads, layout.head_dim)
    return [
        torch.from_numpy(region.blocks).view(dtype).view(-1, len(group.layers), *inner)
        for region, group in zip(regions, layout.groups, strict=True)
    ]


# ---------------------------------------------------------------------------- the instant executor


def _load_instant(settings: ClusterSettings, progress: Progress) -> tuple[ModelFacts, MakeExecute]:
    progress("no model to load", 1.0)
    engine = settings.engine
    folder = Path(engine.model).expanduser()
    config = _read_config(folder)
    layout = instant_layout(engine.block_size)
    num_blocks = ((engine.kv_cache_bytes or KV_BYTES_MIN) // layout.block_bytes[0],)
    eos = config.eos_token_id
    facts = ModelFacts(
        folder=str(folder),
        layout=layout,
        num_blocks=num_blocks,
        max_model_len=min(
            engine.max_model_len or config.max_position_embeddings,
            layout.capacity_tokens(num_blocks),
        ),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        vocab_size=config.vocab_size,
        description=DESCRIPTION,
    )
    return facts, partial(_bind_instant, facts)


class _Config(Struct):
    """What the instant executor needs of a model's config.json."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int | list[int]


def _read_config(folder: Path) -> _Config:
    try:
        return msgspec.json.decode((folder / "config.json").read_bytes(), type=_Config)
    except (OSError, msgspec.DecodeError) as error:
        raise StartupFailed(
            f"the instant executor needs a folder with a plain config.json: {error}"
        ) from error


def _bind_instant(
    facts: ModelFacts, _regions: tuple[Region, ...], _threads: int
) -> tuple[Execute, Callable[[], None]]:
    return InstantExecutor(facts.vocab_size, facts.eos_token_ids).execute, lambda: None


if __name__ == "__main__":
    run_host(sys.argv[1:], load)
