"""Loads a model and settles what runs it: the flat decoder, or Hugging Face's own code.

Owns that choice and the check behind it. Does not know workers or steps. A host process loads a
model once and then forks its workers, so nothing here may leave a thread behind, not even OpenMP's:
hence a single thread while loading.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from penstock.core.errors import StartupFailed
from penstock.engine.architectures import LiftFailed
from penstock.engine.device import Device, find_device
from penstock.engine.hugging_face import HfModule, HuggingFaceModel
from penstock.engine.kernels.select import select_kernels
from penstock.engine.lift import find_architecture, lift
from penstock.engine.model import Forward, LoadedModel, layout_of
from penstock.engine.self_check import (
    MIN_MODEL_LEN,
    TOLERANCE,
    make_probes,
    measure_error,
    reference_logits,
)
from penstock.engine.weights import (
    choose_dtype,
    find_folder,
    identify,
    is_local,
    load_weights,
    read_config,
    read_eos_token_ids,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from penstock.core.config import EngineConfig
    from penstock.engine.architectures import Architecture
    from penstock.engine.kernels import Kernels
    from penstock.engine.self_check import Probe

_logger = logging.getLogger(__name__)

_EXACT_CHECK_PARAMETERS: Final = 64_000_000
"""Up to this size a float32 copy is compared as well, which shows what rounding would hide."""

Progress = Callable[[str, float], None]
"""Told what is being done, and how much of that is done, 0 to 1."""


def load_model(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Load a model, choose what runs it, and check that against Hugging Face.

    `progress` is told what is being done and how much of that is done, 0 to 1.

    Raises: `StartupFailed` when there is no such model, or it is not supported or computes wrongly.
    """
    with _one_thread():
        device = find_device(config.device)
        folder = find_folder(config)
        hf_config = read_config(folder, config)
        text: Any = hf_config.get_text_config()
        loading = _Loading(
            config=config,
            hf_config=hf_config,
            device=device,
            dtype=choose_dtype(config.dtype, device),
            max_model_len=max_model_len_of(config, text),
            progress=progress,
        )
        forward, description = loading.choose()
        return LoadedModel(
            name=folder.resolve().name if is_local(config) else config.model,
            identity=identify(folder, config),
            dtype=loading.dtype_name,
            vocab_size=text.vocab_size,
            max_model_len=loading.max_model_len,
            eos_token_ids=read_eos_token_ids(folder, hf_config),
            description=description,
            forward=forward,
            kernels=loading.kernels(loading.dtype),
            device=device,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What is known of a model without its weights."""

    folder: Path
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


def describe_model(config: EngineConfig) -> ModelDescription:
    """Read what a model's folder says of it, and no weights.

    Raises: `StartupFailed` when there is no such model, or its kind is not supported.
    """
    folder = find_folder(config)
    hf_config = read_config(folder, config)
    text: Any = hf_config.get_text_config()
    return ModelDescription(
        folder=folder,
        vocab_size=text.vocab_size,
        max_model_len=max_model_len_of(config, text),
        eos_token_ids=read_eos_token_ids(folder, hf_config),
    )


@dataclass(slots=True, kw_only=True)
class _Loading:
    """What is known before the weights are read."""

    config: EngineConfig
    hf_config: PreTrainedConfig
    device: Device
    dtype: torch.dtype
    max_model_len: int
    progress: Progress

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def kernels(self, dtype: torch.dtype) -> Kernels:
        return select_kernels(self.device, dtype, self.config.attention_backend)

    def choose(self) -> tuple[Forward, str]:
        """Return what runs the model and its description."""
        row, wanted = find_architecture(self.hf_config), self.config.model_impl
        kind: str = self.hf_config.get_text_config().model_type
        if row is not None and wanted != "transformers":
            try:
                forward, agreement = self._checked(partial(self._lift, row))
            except _NotAsDeclared as difference:
                message = f"the flat decoder does not do what this {kind} model does: {difference}"
                if wanted == "penstock":
                    raise StartupFailed(f"{message}; try --model-impl transformers") from difference
                _logger.warning("%s; Hugging Face's own code runs it, more slowly", message)
            else:
                return forward, f"penstock decoder ({kind}), {self.dtype_name}, {agreement}"
        elif wanted == "penstock":
            raise StartupFailed(
                f"{kind} models are not declared for the flat decoder: leave --model-impl at auto"
            )
        forward, agreement = self._hugging_face()
        return forward, f"Hugging Face's own code ({kind}), {self.dtype_name}, {agreement}"

    def _hugging_face(self) -> tuple[Forward, str]:
        """Return the adopted Hugging Face model and how well it agrees."""
        kind = self.hf_config.model_type
        if self._is_rope_by_length:
            raise StartupFailed(
                f"the rotary embedding of this {kind} model changes with a sequence's length, "
                "which Hugging Face's code cannot do for several sequences at once: lower "
                f"--max-model-len to {_original_positions(self.hf_config.get_text_config())}"
            )
        try:
            return self._checked(self._adopt)
        except _NotAsDeclared as difference:
            raise StartupFailed(f"{kind} models are not supported: {difference}") from difference

    def _checked(self, build: Callable[[PreTrainedModel], Forward]) -> tuple[Forward, str]:
        """Load the model, take its logits, build what will run it, and compare."""
        model, probes = self._load(), self._probes()
        exact: HfModule = model
        dtype = self.dtype
        if dtype is not torch.float32 and model.num_parameters() <= _EXACT_CHECK_PARAMETERS:
            dtype = torch.float32
            exact = deepcopy(exact).to(dtype)
        self.progress("checking", 0.0)
        reference = reference_logits(exact, probes, self.max_model_len)
        forward = build(exact)
        error = self._check(forward, dtype, probes, reference)
        if dtype is not self.dtype:
            forward = build(model)
            self._check(forward, self.dtype, probes, reference)
        name = str(dtype).removeprefix("torch.")
        return forward, f"checked against Hugging Face in {name}: {error:.0e}"

    def _load(self) -> PreTrainedModel:
        self.progress("reading weights", 0.0)
        model = load_weights(self.config, self.hf_config, self.dtype, self.device.torch_device)
        self.progress("reading weights", 1.0)
        return model

    def _lift(self, row: Architecture, model: PreTrainedModel) -> Forward:
        try:
            return lift(model, row, self.max_model_len, partial(self.progress, "packing"))
        # Hugging Face renames attributes now and then.
        except (LiftFailed, AttributeError) as difference:
            raise _NotAsDeclared(str(difference)) from difference

    def _adopt(self, model: PreTrainedModel) -> Forward:
        return HuggingFaceModel.adopt(model, self.max_model_len, packs=not self.device.is_cuda)

    @property
    def _is_rope_by_length(self) -> bool:
        return self.max_model_len > _original_positions(self.hf_config.get_text_config())

    def _probes(self) -> list[Probe]:
        vocab_size: int = self.hf_config.get_text_config().vocab_size
        return make_probes(
            vocab_size,
            self.max_model_len,
            is_rope_by_length=self._is_rope_by_length,
            device=self.device.torch_device,
        )

    def _check(
        self,
        forward: Forward,
        dtype: torch.dtype,
        probes: Sequence[Probe],
        reference: Sequence[Tensor],
    ) -> float:
        layout = layout_of(
            forward, "self-check", str(dtype).removeprefix("torch."), self.config.block_size
        )
        error = measure_error(forward, self.kernels(dtype), layout, probes, reference)
        self.progress("checking", 1.0)
        if not error <= TOLERANCE[dtype]:
            raise _NotAsDeclared(
                f"logits are off by {error:.1e} of their spread in {dtype}, and the tolerance is "
                f"{TOLERANCE[dtype]}"
            )
        return error


class _NotAsDeclared(Exception):
    """What was to run the model differs from Hugging Face."""


def max_model_len_of(config: EngineConfig, text: HfModule) -> int:
    """Return the longest sequence to be served: as asked for, or what the model is made for.

    Raises: `StartupFailed` when neither says, or what was asked for is too long or too short.
    """
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    wanted: int | None = config.max_model_len or longest
    if wanted is None:
        raise StartupFailed("the model does not say how long its context is: give --max-model-len")
    if longest is not None and wanted > longest:
        raise StartupFailed(f"--max-model-len {wanted}: the model was made for {longest} positions")
    if wanted < MIN_MODEL_LEN:
        raise StartupFailed(f"--max-model-len {wanted}: it must be at least {MIN_MODEL_LEN}")
    return wanted


def _original_positions(text: HfModule) -> int:
    """Return the length from which on the rotary embedding is another one, or the whole context."""
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    originals: list[int] = [
        kind["original_max_position_embeddings"]
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min([*originals, getattr(text, "max_position_embeddings", None) or 1 << 62])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
