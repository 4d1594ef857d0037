"""Finds a model's files and loads them as Hugging Face does, or makes up weights of that shape.

Owns folder, config, dtype and identity. Does not know what runs the model. `load_model` calls it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging
from transformers.utils.hub import cached_file

from penstock.core.errors import StartupFailed
from penstock.engine.hugging_face import HfModule

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from penstock.core.config import EngineConfig
    from penstock.engine.device import Device

_SAMPLES_PER_FILE: Final = 16
_SAMPLE_BYTES: Final = 4096
_NOISE_LENGTH: Final = 1_048_583
"""A prime, so that no two rows of a dummy weight begin at the same place of the noise."""


def find_folder(config: EngineConfig) -> Path:
    """Return the folder with the model's config, fetched from the hub if need be.

    Raises: `StartupFailed` when there is no such model.
    """
    if is_local(config):
        folder = Path(config.model).expanduser()
        if not (folder / "config.json").is_file():
            raise StartupFailed(f"{folder} has no config.json: it is not a model folder")
        return folder
    try:
        found = cached_file(config.model, "config.json", revision=config.revision)
    except OSError as error:
        raise StartupFailed(
            f"--model {config.model}: there is no such folder, and the Hugging Face hub gave no "
            f"such model ({error}). Give the path of a folder with config.json and *.safetensors, "
            "or check the name, the network and HF_TOKEN"
        ) from error
    assert found is not None
    return Path(found).parent


def is_local(config: EngineConfig) -> bool:
    """Return whether the model is a folder, not a name on the hub."""
    return Path(config.model).expanduser().is_dir()


def read_config(folder: Path, config: EngineConfig) -> PreTrainedConfig:
    """Return the model's config.

    Raises: `StartupFailed` when its kind of model cannot be served.
    """
    try:
        found: HfModule = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise StartupFailed(f"{folder / 'config.json'} cannot be used: {error}") from error
    kind = found.model_type
    if found.is_encoder_decoder:
        raise StartupFailed(f"{kind} models have an encoder; only decoders are supported")
    method = (getattr(found, "quantization_config", None) or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        raise StartupFailed(
            f"the weights are quantised ({method}), which is not supported: use the model's "
            "original checkpoint"
        )
    text = found.get_text_config()
    other = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other or getattr(text, "kv_lora_rank", None):
        what = ", ".join(sorted(other)) or "latent attention"
        raise StartupFailed(f"{kind} models have layers of a kind that is not supported: {what}")
    return cast("PreTrainedConfig", found)


def choose_dtype(name: str, device: Device) -> torch.dtype:
    """Return the dtype of weights and KV: as asked for, or what the device multiplies natively."""
    if name != "auto":
        return cast("torch.dtype", getattr(torch, name))
    if (
        device.is_cuda
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    ):
        return torch.bfloat16
    return torch.float32


def load_weights(
    config: EngineConfig, hf_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Return the model on its device, with eager attention, in inference mode.

    Raises: `StartupFailed` when files are missing or are not this model's.
    """
    auto: HfModule = AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if config.trust_remote_code:
        options["trust_remote_code"] = True
    try:
        if config.load_format == "dummy":
            with no_init_weights(), device:
                model = auto.from_config(hf_config, **options)
            _fill(model, config.seed)
        else:
            with _no_progress_bar():
                # By name, not by folder: on the hub, only the config has been fetched so far.
                model, info = auto.from_pretrained(
                    Path(config.model).expanduser() if is_local(config) else config.model,
                    revision=config.revision,
                    config=hf_config,
                    output_loading_info=True,
                    **options,
                )
            _check_complete(config.model, info)
    except (OSError, ValueError) as error:
        raise StartupFailed(f"--model {config.model} cannot be loaded: {error}") from error
    model = model.to(device).eval().requires_grad_(requires_grad=False)
    return cast("PreTrainedModel", model)


def identify(folder: Path, config: EngineConfig) -> str:
    """Return a name for the weights: the same on every host, another for every other checkpoint.

    Hashes the config and, of each file of weights, its size, its header and samples throughout.
    """
    digest = blake2b(digest_size=8)
    digest.update((folder / "config.json").read_bytes())
    if config.load_format == "dummy":
        digest.update(f"dummy {config.seed}".encode())
    else:
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for index in range(_SAMPLES_PER_FILE):
                    file.seek(index * max(0, size - _SAMPLE_BYTES) // (_SAMPLES_PER_FILE - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_eos_token_ids(folder: Path, hf_config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the tokens that end a text, from the generation config and the config."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    text: Any = hf_config.get_text_config()
    found: set[int] = set()
    for value in (generation.get("eos_token_id"), getattr(text, "eos_token_id", None)):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def _fill(model: HfModule, seed: int) -> None:
    """Give a model made without initialisation random matrices and ordinary vectors.

    Matrices are cut from one stretch of noise: drawing each number anew would take a minute for
    eight billion.
    """
    start = 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        noise = (torch.randn(_NOISE_LENGTH) * 0.02).to(model.device, model.dtype)
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own and all(parameter.dim() < 2 for parameter in own):
                # Norms and the like: what stands for "no change" is the model's own affair.
                model._init_weights(module)
                continue
            for parameter in own:
                if parameter.dim() < 2:
                    parameter.zero_()
                else:
                    start = _tile(parameter.data, noise, start)
    model.tie_weights()


def _tile(target: Tensor, noise: Tensor, start: int) -> int:
    """Fill a contiguous tensor with `noise`, repeated, from `start` on; return where that ends."""
    flat = target.view(-1)
    done = 0
    while done < len(flat):
        piece = noise[start : start + len(flat) - done]
        flat[done : done + len(piece)] = piece
        done += len(piece)
        start = (start + len(piece)) % len(noise)
    return start


def _check_complete(name: str, info: dict[str, Any]) -> None:
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise StartupFailed(
            f"{name} is not complete: {len(missing)} weights are missing or of another shape, "
            f"the first of them {missing[0]}"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on the terminal: `load_model` reports progress itself."""
    bars: HfModule = logging
    was_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            bars.enable_progress_bar()
