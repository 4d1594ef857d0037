"""What a model will be on a device, found out without its weights and without the device.

Owns the shape of its KV and an estimate of the memory that it takes. A host that is to fork its
workers must not touch CUDA, and yet has to say how many blocks each of them has: it asks here. The
workers load the model themselves and hold it against the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from penstock.core.types import GIB
from penstock.engine.architectures import LiftFailed
from penstock.engine.graphs import bucket_sizes
from penstock.engine.hugging_face import HfModule, HuggingFaceModel
from penstock.engine.lift import find_architecture, lift
from penstock.engine.loading import max_model_len_of
from penstock.engine.model import layout_of
from penstock.engine.weights import (
    choose_dtype,
    find_folder,
    identify,
    read_config,
    read_eos_token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from penstock.core.block import KVLayout
    from penstock.core.config import EngineConfig
    from penstock.engine.device import Device
    from penstock.engine.model import Forward

CONTEXT_BYTES: Final = GIB
"""What a process takes of a GPU beside tensors: its context, kernels, libraries' workspaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A model that is not loaded. `weight_bytes` are all its parameters, each once."""

    folder: Path
    layout: KVLayout
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    description: str

    def working_bytes(self, *, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """Return about how much one worker needs beside weights and KV."""
        rows = max(max_num_seqs, bucket_sizes(max_num_seqs)[-1])
        # Logits of every row, in their own type and in float32, and a graph's copy of them.
        logits = rows * self.vocab_size * (2 + 4 + 4)
        # The residual stream and what is derived from it; gate, up and their product.
        of_token = 4 * (8 * self.hidden_size + 3 * self.intermediate_size)
        return CONTEXT_BYTES + logits + max_num_batched_tokens * of_token


def plan_model(config: EngineConfig, device: Device) -> ModelPlan:
    """Return what a model will be on a device of that kind.

    Raises: `StartupFailed` when there is no such model, or its kind is not supported.
    """
    folder = find_folder(config)
    hf_config = read_config(folder, config)
    text: Any = hf_config.get_text_config()
    dtype = choose_dtype(config.dtype, device)
    max_model_len = max_model_len_of(config, text)
    forward, weight_bytes = _forward(config, hf_config, dtype, max_model_len)
    name = str(dtype).removeprefix("torch.")
    return ModelPlan(
        folder=folder,
        layout=layout_of(forward, identify(folder, config), name, config.block_size),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        max_model_len=max_model_len,
        eos_token_ids=read_eos_token_ids(folder, hf_config),
        weight_bytes=weight_bytes,
        description=f"{text.model_type}, {name}, {device.kind}",
    )


def _forward(
    config: EngineConfig, hf_config: PreTrainedConfig, dtype: torch.dtype, max_model_len: int
) -> tuple[Forward, int]:
    """Return what will run the model, with empty weights, and the bytes of its weights."""
    row = find_architecture(hf_config)
    if row is not None and config.model_impl != "transformers":
        model = _empty(config, hf_config, dtype, torch.device("meta"))
        weight_bytes = _num_bytes(model)
        try:
            return lift(model, row, max_model_len), weight_bytes
        except (LiftFailed, AttributeError):
            pass  # a worker that loads it will say why, and run Hugging Face's code
    # Its attention is learnt from a run of two tokens: over pages that nobody ever wrote.
    model = _empty(config, hf_config, dtype, torch.device("cpu"))
    return HuggingFaceModel.adopt(model, max_model_len, packs=False), _num_bytes(model)


def _empty(
    config: EngineConfig, hf_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> HfModule:
    auto: HfModule = AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if config.trust_remote_code:
        options["trust_remote_code"] = True
    with no_init_weights(), device:
        model = auto.from_config(hf_config, **options)
    model.tie_weights()
    return model.eval().requires_grad_(requires_grad=False)


def _num_bytes(model: HfModule) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
