"""The host process of a local cluster, as `HostProcess.spawn` starts it: `python -m` this module.

The composition root of a worker: worker core, model or instant executor, shared memory pools and
block mover are put together here. Torch is imported while the model is loaded, and not at all for
the instant executor.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from penstock.cli.memory import WorkerMemory, host_memory
from penstock.cli.tiers import (
    check_tiers,
    choose_codecs,
    describe_tiers,
)
from penstock.core.config import WorkerConfig
from penstock.core.errors import BackendUnavailable, StartupFailed
from penstock.core.types import GIB, MIB, RequestId
from penstock.native.build import Recipe, build
from penstock.runtime.host import RunWorker, run_host
from penstock.runtime.instant import DESCRIPTION, InstantExecutor, instant_layout
from penstock.runtime.link import WorkerSpec
from penstock.runtime.processes import available_bytes, usable_cores
from penstock.runtime.settings import (
    INSTANT_EXECUTOR,
    ClusterSettings,
    ModelFacts,
)
from penstock.runtime.worker import WorkerEngine, WorkerParts, WorkerPlace, run_worker
from penstock.transport.native.library import TRANSPORT, load_library
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_agent import MISSING, is_installed
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

MAX_ROUNDS = 32
"""Tokens for which a sequence that decodes on a device gets its blocks beforehand."""
Progress = Callable[[str, float], None]
MakeParts = Callable[
    [ClusterSettings, ModelFacts, WorkerSpec, WorkerPlace], tuple[WorkerMemory, WorkerEngine]
]
"""Makes, in a process that was just forked, a worker's memory and what runs its steps."""


def load(settings: ClusterSettings, progress: Progress) -> tuple[ModelFacts, RunWorker]:
    """Load what workers execute; return its facts and what a worker does.

    Raises: `StartupFailed` saying what to change.
    """
    if settings.transport == Nixl.kind and not is_installed():
        raise StartupFailed(f"--transport nixl: {MISSING}")
    compile_once(TRANSPORT, progress)  # now and not in some request's hand-off; workers share it
    load_library()
    if settings.executor == INSTANT_EXECUTOR:
        find = _load_instant
    elif not settings.num_workers:
        find = _describe_model
    else:
        progress("importing torch", 0.0)
        settings = _with_device(settings)
        find = _load_model if settings.engine.device == "cpu" else _plan_model
    facts, make_parts = find(settings, progress)
    check_tiers(settings, facts.layout, facts.tier_codecs)
    told = describe_tiers(settings, facts.layout, facts.tier_codecs)
    facts = msgspec.structs.replace(facts, tiers=told)
    return facts, partial(_work, settings, facts, make_parts)


def _work(
    settings: ClusterSettings,
    facts: ModelFacts,
    make_parts: MakeParts,
    spec: WorkerSpec,
    place: WorkerPlace,
) -> None:
    """Be a worker."""
    if settings.is_pinned:
        _pin(spec.index, _threads(settings))
    memory, engine = make_parts(settings, facts, spec, place)
    layout = facts.layout
    assert layout is not None, facts
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
        max_rounds=MAX_ROUNDS if engine.rounds is not None else 1,
        tiers=memory.tier_configs,
        wire=memory.wire,
        host=place.host,
    )
    core = Worker(config, memory.generations)
    parts = WorkerParts(
        core=core,
        execute=engine.execute,
        digest=memory.digest,
        prepare=engine.prepare,
        rounds=engine.rounds,
        observe=engine.observe,
        move=memory.move,
        peers=memory.peers,
        regions=memory.regions,
        endpoints=memory.endpoints,
        engine=engine.description,
        tiers=memory.tiers,
        probe=memory.probe,
        requests=partial(_requests, core),
    )
    run_worker(config, parts, place)


def compile_once(recipe: Recipe, progress: Progress) -> None:
    """Build what is not built yet, and say so meanwhile: the first time takes many seconds."""
    with suppress(BackendUnavailable):  # said, loudly, by what has to do without
        build(recipe, lambda said: progress(said, 0.0))


def _threads(settings: ClusterSettings) -> int:
    return settings.threads or max(1, usable_cores() // settings.most_workers)


def _requests(core: Worker) -> list[RequestId]:
    return [*core.sequences, *(entry.session.request_id for entry in core.pulls.pending)]


def _pin(index: int, threads: int) -> None:
    """Keep worker `index` on cores of its own; when there are too few, they are shared in turn."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(
        0, {cores[(index * threads + offset) % len(cores)] for offset in range(threads)}
    )


# --------------------------------------------------------------------------------------- the model


def _load_model(settings: ClusterSettings, progress: Progress) -> tuple[ModelFacts, MakeParts]:
    # What workers need is imported here as well: they find it in memory when they are forked.
    from penstock.engine.executor import ModelExecutor
    from penstock.engine.kv_access import recorded_executor
    from penstock.engine.loading import load_model
    from penstock.engine.native.library import KERNELS
    from penstock.engine.weights import find_folder

    compile_once(KERNELS, progress)
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
        wire=chosen.wire,
        codec_notes=chosen.notes,
    )
    path = settings.kv_access_log
    if path is not None:
        return facts, partial(_bind_model, model, partial(recorded_executor, model, path))
    return facts, partial(_bind_model, model, partial(ModelExecutor, model))


def _with_device(settings: ClusterSettings) -> ClusterSettings:
    """Return the settings with the device decided; torch is not asked for where it is the CPU."""
    if settings.engine.device == "cpu":
        return settings
    from penstock.cli.device import choose_device

    return msgspec.structs.replace(settings, engine=choose_device(settings.engine))


def _plan_model(settings: ClusterSettings, progress: Progress) -> tuple[ModelFacts, MakeParts]:
    """Find out what workers on a device will have; they load the model themselves."""
    progress("planning the model", 0.0)
    from penstock.cli.device import load_on_device

    planned = load_on_device(settings)
    # What the front shows until the last worker is up.
    progress("loading in each worker", 0.0)
    return planned


def _describe_model(settings: ClusterSettings, progress: Progress) -> tuple[ModelFacts, MakeParts]:
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
    _settings: ClusterSettings, _facts: ModelFacts, spec: WorkerSpec, _place: WorkerPlace
) -> tuple[WorkerMemory, WorkerEngine]:
    raise AssertionError(f"{spec} was forked without a model")


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
    model: "LoadedModel",
    make_executor: "Callable[[tuple[Tensor, ...]], ModelExecutor | RecordedExecutor]",
    settings: ClusterSettings,
    facts: ModelFacts,
    spec: WorkerSpec,
    place: WorkerPlace,
) -> tuple[WorkerMemory, WorkerEngine]:
    import torch

    from penstock.engine.observe import Observer

    memory = host_memory(settings, facts, spec, place)
    executor = make_executor(tuple(memory.tensors()))

    def prepare() -> None:
        # OpenMP keeps the number of threads per thread that asks, so the asking one sets it.
        torch.set_num_threads(_threads(settings))

    execute = torch.inference_mode()(executor.execute)
    observe = Observer(model, tuple(memory.tensors())).observe
    return memory, WorkerEngine(execute, prepare, facts.description, observe=observe)


# ---------------------------------------------------------------------------- the instant executor


def _load_instant(settings: ClusterSettings, progress: Progress) -> tuple[ModelFacts, MakeParts]:
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
    return facts, _bind_instant


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
    settings: ClusterSettings, facts: ModelFacts, spec: WorkerSpec, place: WorkerPlace
) -> tuple[WorkerMemory, WorkerEngine]:
    memory = host_memory(settings, facts, spec, place)
    execute = InstantExecutor(facts.vocab_size, facts.eos_token_ids).execute
    return memory, WorkerEngine(execute, lambda: None, DESCRIPTION)


if __name__ == "__main__":
    run_host(sys.argv[1:], load)
