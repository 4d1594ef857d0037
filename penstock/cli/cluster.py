"""From options to a launched cluster: the steps that `penstock serve` and the Python API share."""

import socket
from argparse import Namespace
from pathlib import Path

from penstock.cli.control_arguments import controller_config
from penstock.core.config import EngineConfig, Handoff
from penstock.core.errors import StartupFailed
from penstock.runtime.settings import (
    ClusterSettings,
    NetworkSettings,
    PulseSettings,
    split_address,
)

NO_MODEL_NAME = "instant-executor-no-model"
BUILTIN_MODEL = Path(__file__).parents[1] / "builtin" / "penstock-tiny"


def cluster_settings(options: Namespace) -> ClusterSettings:
    """Return the settings that the options of `penstock serve` ask for.

    Raises: `StartupFailed` naming the option that does not fit.
    """
    is_split = not options.mixed
    prefill = _or_default(options.prefill, is_split or options.decode)
    decode = _or_default(options.decode, is_split or options.prefill)
    num_workers = prefill + decode + options.mixed
    return ClusterSettings(
        engine=EngineConfig(
            model=find_model(options.model),
            dtype=options.dtype,
            device=options.device,
            gpu_memory_utilization=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
            attention_backend=options.attention_backend,
            load_format=options.load_format,
            model_impl=options.model_impl,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            block_size=options.block_size,
            kv_cache_bytes=options.kv_cache_memory,
            max_model_len=options.max_model_len,
            seed=options.seed,
        ),
        prefill=prefill,
        decode=decode,
        mixed=options.mixed,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        is_prefix_caching=not options.no_prefix_caching,
        executor=options.executor,
        transport=options.transport,
        tcp_streams=options.tcp_streams,
        threads=options.threads,
        is_pinned=options.pin_cores,
        decision_log=options.decision_log,
        network=_network(options),
        pulse=pulse_settings(options),
        handoff=Handoff(options.handoff),
        handoff_codec=options.handoff_codec,
        control=controller_config(options, num_workers),
        tiers=tuple(options.kv_tier),
        kv_quality=options.kv_quality,
        kv_access_log=options.record_kv_access,
        kv_eviction=options.kv_eviction,
    )


def pulse_settings(options: Namespace) -> PulseSettings:
    """Return when members count as dead. Raises: `StartupFailed` naming the option."""
    return PulseSettings(
        interval_s=options.heartbeat_interval,
        suspect_after_s=options.lost_after / 3,
        lost_after_s=options.lost_after,
        step_timeout_s=options.step_timeout,
        rejoin_timeout_s=getattr(options, "rejoin_timeout", 0.0),
    )


def _network(options: Namespace) -> NetworkSettings | None:
    """Return where other hosts join, None without --listen."""
    if options.listen is None:
        return None
    host, port = split_address(options.listen, "--listen")
    return NetworkSettings(
        host=host,
        port=port,
        advertised=options.advertise or ("" if is_one_address(host) else own_address()),
        key_file=options.cluster_key_file,
    )


def is_one_address(host: str) -> bool:
    """False for what stands for all addresses of this machine."""
    return host not in ("0.0.0.0", "::")


def own_address() -> str:
    """Return the address of this machine that faces other hosts, the loopback one without any."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: it only asks which way a packet would leave. (RFC 5737 address)
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def find_model(model: str | None) -> str:
    """Return the folder or hub name that `model` stands for: the built-in one by name or default.

    A folder of the same name in the working directory is meant before the built-in model.
    """
    is_builtin = model is None or (model == BUILTIN_MODEL.name and not Path(model).is_dir())
    return str(BUILTIN_MODEL) if is_builtin else str(model)


def find_clusters_model(model: str, here: str | None) -> str:
    """Return where the model of a cluster that was joined lies on this host; `here` if given.

    Raises: `StartupFailed` when it is a folder that is not here.
    """
    if here is not None:
        return find_model(here)
    path = Path(model).expanduser()
    if path.is_dir():
        return model
    if path.parts[-3:] == BUILTIN_MODEL.parts[-3:]:
        return str(BUILTIN_MODEL)
    if path.is_absolute() or model.startswith((".", "~")):
        raise StartupFailed(
            f"the cluster serves {model}, and there is no such folder on this host: say where it "
            "lies here, as MODEL"
        )
    return model


def _or_default(count: int | None, is_wanted: object) -> int:
    """A number that was not given is 1 where the other half of a split needs it, else 0."""
    return count if count is not None else int(bool(is_wanted))


def model_name(model: str) -> str:
    """Return what a model is called when nobody says: the last part of its path or name."""
    return Path(model).expanduser().resolve().name if Path(model).is_dir() else Path(model).name
