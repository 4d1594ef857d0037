"""From options to a launched cluster: the steps that `penstock serve` and the Python API share."""

from argparse import Namespace
from pathlib import Path

from penstock.core.config import EngineConfig
from penstock.runtime.settings import ClusterSettings

NO_MODEL_NAME = "instant-executor-no-model"
BUILTIN_MODEL = Path(__file__).parents[1] / "builtin" / "penstock-tiny"


def cluster_settings(options: Namespace) -> ClusterSettings:
    """Return the settings that the options of `penstock serve` ask for.

    Raises: `StartupFailed` naming the option that does not fit.
    """
    is_split = not options.mixed
    return ClusterSettings(
        engine=EngineConfig(
            model=find_model(options.model),
            dtype=options.dtype,
            load_format=options.load_format,
            model_impl=options.model_impl,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            block_size=options.block_size,
            kv_cache_bytes=options.kv_cache_memory,
            max_model_len=options.max_model_len,
            seed=options.seed,
        ),
        prefill=_or_default(options.prefill, is_split or options.decode),
        decode=_or_default(options.decode, is_split or options.prefill),
        mixed=options.mixed,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        is_prefix_caching=not options.no_prefix_caching,
        executor=options.executor,
        transport=options.transport,
        threads=options.threads,
        is_pinned=options.pin_cores,
        decision_log=options.decision_log,
    )


def find_model(model: str | None) -> str:
    """Return the folder or hub name that `model` stands for: the built-in one by name or default.

    A folder of the same name in the working directory is meant before the built-in model.
    """
    is_builtin = model is None or (model == BUILTIN_MODEL.name and not Path(model).is_dir())
    return str(BUILTIN_MODEL) if is_builtin else str(model)


def _or_default(count: int | None, is_wanted: object) -> int:
    """A number that was not given is 1 where the other half of a split needs it, else 0."""
    return count if count is not None else int(bool(is_wanted))


def model_name(model: str) -> str:
    """Return what a model is called when nobody says: the last part of its path or name."""
    return Path(model).expanduser().resolve().name if Path(model).is_dir() else Path(model).name
