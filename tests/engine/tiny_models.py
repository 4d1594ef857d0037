"""Tiny random models of every architecture under test, as folders that `load_model` takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 199

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.15,
}
_WINDOWS = {
    "sliding_window": 10,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_SHARED_EXPERTS = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

DECLARED: dict[str, dict[str, Any]] = {
    "arcee": {},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.25},
    "cohere-no-qk-norm": {"use_qk_norm": False},
    "cohere2": _WINDOWS,
    "cwm": _WINDOWS,
    "dots1": _SHARED_EXPERTS,
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
        "moe_num_shared_experts": 1,
    },
    "flex_olmo": _EXPERTS,
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {**_WINDOWS, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_WINDOWS, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_SHARED_EXPERTS, "use_qk_norm": True},
    "gpt_oss": {**_WINDOWS, **_EXPERTS},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "granitemoe": {**_EXPERTS, "attention_multiplier": 0.3, "residual_multiplier": 0.4},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {**_EXPERTS, "moe_topk": 2},
    "jais2": {},
    "llama": {},
    "llama-tied-biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama-llama3-rope": {"rope_parameters": _LLAMA3_ROPE},
    "minimax_m2": _EXPERTS,
    "ministral": _WINDOWS,
    "mistral": {"sliding_window": 10},
    "mixtral": _EXPERTS,
    "nemotron": {},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "olmoe": {**_EXPERTS, "head_dim": 16},
    "phi": {},
    "phi-qk-norm": {"qk_layernorm": True},
    "phi3": {"sliding_window": 10},
    "phi3-partial-rotary": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "phimoe": _EXPERTS,
    "qwen2": {**_WINDOWS, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {**_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    "seed_oss": {"attention_out_bias": False},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "solar_open": {**_EXPERTS, "n_routed_experts": 4, "moe_intermediate_size": 32},
    "stablelm": {},
    "starcoder2": {"sliding_window": 10},
    "vaultgemma": {**_WINDOWS, "query_pre_attn_scalar": 32},
}
"""Config values beyond the common ones; a name's first part is its `model_type`."""

UNDECLARED: dict[str, dict[str, Any]] = {
    "apertus": {},
    "exaone4": {"sliding_window": 10, "sliding_window_pattern": 2},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "olmo": {"clip_qkv": 2.0},
}


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a random model with weights large enough that every part of it matters."""
    values = {**_COMMON, **DECLARED.get(name, {}), **UNDECLARED.get(name, {}), **changes}
    config = AutoConfig.for_model(name.split("-")[0], **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                # Norms of ones and biases of zeros would hide that they are swapped or left out.
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_model(folder: Path, name: str, **changes: Any) -> PreTrainedModel:
    """Write such a model to a folder and return it."""
    model = make_model(name, **changes)
    model.save_pretrained(folder)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    return torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist()


def hugging_face_tokens(
    model: PreTrainedModel, prompts: Sequence[list[int]], max_tokens: int
) -> list[list[int]]:
    """Return how `generate` continues each prompt, alone and greedily, eos ignored."""
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, use_cache=True
        )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs
