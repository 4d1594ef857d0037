"""Workers on a device: which GPU each of them has, what of its memory, and the model, loaded there.

A host process forks its workers, and CUDA does not survive a fork: so the host never touches it. It
asks a child what GPUs there are and plans the model without its weights; each worker loads the
model itself, after the fork, onto the GPU that is its own or that it shares. The price is that a
worker that is replaced loads anew, and that weights are on a GPU once for each worker there. KV
codecs are measured on the model by a child, too, which loads it for that and ends.
`--device interpreter` goes the same way on a machine without a GPU, for tests and development.
"""

import os
from dataclasses import replace
from functools import partial

import msgspec
import torch

from penstock.cli.memory import DevicePools, WorkerMemory, device_memory, host_memory
from penstock.cli.tiers import check_tiers, choose_codecs
from penstock.core.config import EngineConfig, Handoff
from penstock.core.errors import StartupFailed
from penstock.core.types import GIB, MIB
from penstock.engine.device import (
    CUDA,
    INTERPRETER,
    CudaFacts,
    Device,
    find_device,
    in_child,
    is_kernel_compiler_present,
    no_cuda,
    probe_cuda,
)
from penstock.engine.device_executor import DeviceExecutor
from penstock.engine.graphs import EagerReplay, choose_capture
from penstock.engine.loading import load_model
from penstock.engine.model import LoadedModel, num_blocks
from penstock.engine.observe import Observer
from penstock.engine.plan import ModelPlan, plan_model
from penstock.engine.pools import make_pools
from penstock.kv.tiers import RAW
from penstock.runtime.executor import Rounds
from penstock.runtime.link import WorkerSpec
from penstock.runtime.settings import AUTO, ClusterSettings, ModelFacts, TierCodec
from penstock.runtime.tier_codecs import Chosen, wanted_codecs
from penstock.runtime.worker import WorkerEngine, WorkerPlace

INTERPRETED_KV_BYTES = 64 * MIB
CODECS_TIMEOUT_S = 300.0
"""For loading the model and measuring codecs on it; the host may be silent for twice as long."""


def choose_device(engine: EngineConfig) -> EngineConfig:
    """Return the engine's settings with "auto" decided: a GPU if there is one that can be used."""
    if engine.device != "auto":
        return engine
    has_gpu = is_kernel_compiler_present() and bool(probe_cuda())
    return msgspec.structs.replace(engine, device=CUDA if has_gpu else "cpu")


def load_on_device(
    settings: ClusterSettings,
) -> tuple[ModelFacts, "partial[tuple[WorkerMemory, WorkerEngine]]"]:
    """Plan the model; return its facts and what makes a worker's memory and engine after the fork.

    Raises: `StartupFailed` saying what to change.
    """
    # What libraries ask torch in this process must not begin CUDA, or workers could not after the
    # fork: torch answers by the driver's management library then.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    gpus = _find_gpus(settings)
    engine = settings.engine
    plan = plan_model(engine, Device(CUDA if gpus else INTERPRETER))
    counts = num_blocks(
        plan.layout,
        _kv_bytes(settings, plan, gpus),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    check_tiers(settings, plan.layout)
    chosen = _choose_codecs(settings, plan)
    where = gpus[0].name if gpus else "Triton's interpreter"
    facts = ModelFacts(
        folder=str(plan.folder),
        layout=plan.layout,
        num_blocks=counts,
        max_model_len=min(plan.max_model_len, plan.layout.capacity_tokens(counts)),
        eos_token_ids=plan.eos_token_ids,
        vocab_size=plan.vocab_size,
        description=f"{plan.description} ({where}), loaded and checked by each worker",
        tier_codecs=chosen.codecs,
        codec_notes=chosen.notes,
    )
    return facts, partial(_make_worker, len(gpus))


class _Answer(msgspec.Struct, frozen=True):
    """What the child that measures codecs has found, or why the cluster cannot start."""

    codecs: tuple[TierCodec, ...] = ()
    notes: tuple[str, ...] = ()
    refusal: str = ""


def _choose_codecs(settings: ClusterSettings, plan: ModelPlan) -> Chosen:
    """Decide in which codec blocks lie in each tier. Raises: `StartupFailed`."""
    if all(name == RAW for name in wanted_codecs(settings.tiers, settings.kv_quality)):
        return Chosen()

    def measure() -> bytes:
        torch.set_num_threads(1)  # OpenMP's do not survive a fork
        try:
            model = load_model(settings.engine, lambda _stage, _fraction: None)
            found = choose_codecs(settings, model, plan.folder, lambda _stage, _fraction: None)
        except StartupFailed as refusal:
            return msgspec.json.encode(_Answer(refusal=str(refusal)))
        return msgspec.json.encode(_Answer(found.codecs, found.notes))

    try:
        answer = in_child(measure, CODECS_TIMEOUT_S)
    except TimeoutError as error:
        raise StartupFailed(
            f"--kv-tier: the process that measures codecs on the model gave {error}: say "
            "codec=raw in each --kv-tier to start without codecs"
        ) from None
    if not answer:
        raise StartupFailed("--kv-tier: the process that measures codecs on the model has died")
    found = msgspec.json.decode(answer, type=_Answer)
    if found.refusal:
        raise StartupFailed(found.refusal)
    return Chosen(found.codecs, notes=found.notes)


def _find_gpus(settings: ClusterSettings) -> tuple[CudaFacts, ...]:
    """Return the GPUs that workers are shared out among, none for the interpreter.

    Raises: `StartupFailed` when there is none, or it cannot be had as asked for.
    """
    kind, _, index = settings.engine.device.partition(":")
    if settings.handoff_codec != RAW:
        raise StartupFailed(
            f"--device {settings.engine.device} does not go with --handoff-codec: the KV of a "
            "device does not cross TCP; use --device cpu"
        )
    if kind == INTERPRETER:
        return ()
    if kind != CUDA or (index and not index.isdecimal()):
        raise StartupFailed(
            f"--device {settings.engine.device}: it is none of cpu, cuda, cuda:N and auto"
        )
    gpus = probe_cuda()
    if not gpus or int(index or 0) >= len(gpus):
        raise StartupFailed(no_cuda(settings.engine.device))
    refused = {
        "--listen": settings.network is not None,
        "--handoff push": settings.handoff is Handoff.PUSH,
        f"--transport {settings.transport}": settings.transport != AUTO,
    }
    if settings.kv_access_log is not None:
        raise StartupFailed(
            "--record-kv-access: the kernels of a GPU do not keep what each row looks at: use "
            "--device cpu"
        )
    for flag, is_asked_for in refused.items():
        if is_asked_for:
            raise StartupFailed(
                f"--device {settings.engine.device} does not go with {flag}: blocks in the memory "
                "of a GPU are pulled by workers on GPUs of the same host, by CUDA IPC"
            )
    return gpus[int(index) : int(index) + 1] if index else gpus


def _kv_bytes(settings: ClusterSettings, plan: ModelPlan, gpus: tuple[CudaFacts, ...]) -> int:
    """Size the KV cache of each worker. Raises: `StartupFailed` when a GPU has not enough."""
    wanted = settings.engine.kv_cache_bytes
    if not gpus:
        return wanted or INTERPRETED_KV_BYTES
    sharers = -(-settings.most_workers // len(gpus))
    share = min(gpu.total_bytes for gpu in gpus) * settings.engine.gpu_memory_utilization / sharers
    working = plan.working_bytes(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    left = int(share) - plan.weight_bytes - working
    if left < (wanted or plan.layout.token_bytes):
        raise StartupFailed(
            f"--gpu-memory-utilization {settings.engine.gpu_memory_utilization:g}: each of "
            f"{sharers} workers on a GPU has {share / GIB:.1f} GiB, weights take "
            f"{plan.weight_bytes / GIB:.1f} and work {working / GIB:.1f}: that leaves "
            f"{max(0, left) / GIB:.1f} for the KV cache"
        )
    return wanted or left


def _make_worker(
    num_gpus: int,
    settings: ClusterSettings,
    facts: ModelFacts,
    spec: WorkerSpec,
    place: WorkerPlace,
) -> tuple[WorkerMemory, WorkerEngine]:
    """Load the model in a process that was just forked, and bind it to pools on its device."""
    engine = settings.engine
    if num_gpus and ":" not in engine.device:
        engine = msgspec.structs.replace(engine, device=f"{CUDA}:{spec.index % num_gpus}")
    model = load_model(engine, lambda _stage, _fraction: None)
    layout = model.layout(engine.block_size)
    if layout != facts.layout:
        raise StartupFailed(f"the model has become {layout}, and was to be {facts.layout}")
    device = find_device(engine.device)
    if device.is_cuda:
        torch.cuda.empty_cache()  # what loading and the check have given back is others' as well
        pools = make_pools(layout, facts.num_blocks, device)
        on_device = DevicePools(tuple(pools), device.index)
        memory = device_memory(settings, facts, spec, place, on_device)
    else:
        memory = host_memory(settings, facts, spec, place)
    return _bind(model, memory, settings, facts)


def _bind(
    model: LoadedModel, memory: WorkerMemory, settings: ClusterSettings, facts: ModelFacts
) -> tuple[WorkerMemory, WorkerEngine]:
    executor = DeviceExecutor(
        model,
        tuple(memory.tensors()),
        EagerReplay() if settings.engine.enforce_eager else choose_capture(model),
        max_num_seqs=settings.max_num_seqs,
        max_model_len=facts.max_model_len,
    )
    # Without a GPU nothing is compiled, and a prompt takes its time.
    most = settings.max_num_batched_tokens
    executor.warm_up((most, most // 4, 2) if model.device.is_cuda else ())
    engine = WorkerEngine(
        execute=executor.execute,
        prepare=executor.prepare,
        description=model.description,
        rounds=Rounds(executor.rounds, settings.engine.block_size),
        observe=Observer(model, tuple(memory.tensors())).observe,
    )
    return replace(memory, digest=executor.beside(memory.digest)), engine
