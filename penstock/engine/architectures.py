"""The architectures that the flat decoder runs: which attribute of a Hugging Face model holds what.

Owns a table and nothing else. An architecture is added by a row, and only if the row is all it
takes: everything else runs as the untouched Hugging Face model. `lift` reads the table; the
start-up self-check is what makes a wrong row harmless.

Attribute names are those of transformers' `modeling_<type>.py`; `None` means that there is none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from penstock.engine.kernels import NormKind


class LiftFailed(Exception):
    """A model is not what its row in the table says; it can still run as Hugging Face has it."""


class RotaryTable(Enum):
    """How the cosines that a model's rotary module returns relate to pairs of head elements.

    HALVES      each angle twice, first half and second half; i pairs with i + n / 2 (Llama)
    ONCE        each angle once; i pairs with i + n / 2 (gpt-oss)
    ADJACENT    each angle twice, as HALVES; 2i pairs with 2i + 1 (GLM, ERNIE)
    REPEATED    each angle twice in a row; 2i pairs with 2i + 1 (Cohere)
    """

    HALVES = 0
    ONCE = 1
    ADJACENT = 2
    REPEATED = 3


class WindowSource(Enum):
    """Where a sliding window is written: nowhere, in a layer's attention, once in the config."""

    NONE = 0
    ATTENTION = 1
    CONFIG = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Where the parts of a decoder are. Defaults are Llama's.

    Of a layer:     its norms (before and after attention and MLP) and its blocks
    Of attention:   its projections, head norms, window and the layers that have no rotary embedding
    Of the MLP:     its projections; `is_gated` multiplies the first half by the second. One with
                    `experts` is left as it is
    `norm_offset` is added to every norm weight. A `parallel` layer feeds attention and MLP the same
    norm and adds both. `required` are config values without which the row does not hold.
    """

    attention_norm: str | None = "input_layernorm"
    attention_output_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"
    is_parallel: bool = False
    residual_multiplier: str | None = None

    norm_kind: NormKind = NormKind.RMS_LLAMA
    norm_eps: str = "variance_epsilon"
    norm_offset: float = 0.0
    final_norm: str = "norm"

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_output: str = "o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    norm_spans_heads: bool = False
    norm_after_rotary: bool = False
    rotary_table: RotaryTable = RotaryTable.HALVES
    has_rotary: str | None = None
    window: WindowSource = WindowSource.NONE
    softcap: str | None = None
    sinks: str | None = None

    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    is_gated: bool = True
    experts: str | None = None
    activation: str = "hidden_act"

    embedding_multiplier: str | None = None
    logits_scale: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    required: tuple[tuple[str, object], ...] = ()


_LLAMA = Architecture()
_WINDOWED = replace(_LLAMA, window=WindowSource.ATTENTION)
_EXPERTS = replace(_LLAMA, experts="experts")
_LAYER_NORM = replace(_LLAMA, norm_kind=NormKind.LAYER, norm_eps="eps")
_QWEN3 = replace(_WINDOWED, query_norm="q_norm", key_norm="k_norm")
_COHERE = replace(
    _LLAMA,
    is_parallel=True,
    mlp_norm=None,
    norm_kind=NormKind.LAYER,
    rotary_table=RotaryTable.REPEATED,
    logits_scale="logit_scale",
)
_GEMMA = replace(
    _LLAMA,
    norm_kind=NormKind.RMS,
    norm_eps="eps",
    norm_offset=1.0,
    embedding_multiplier="scalar_embed_scale",
)
_GEMMA2 = replace(
    _GEMMA,
    activation="hidden_activation",
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    window=WindowSource.ATTENTION,
    softcap="attn_logit_softcapping",
    logits_softcap="final_logit_softcapping",
)
_PHI3 = replace(_LLAMA, qkv=("qkv_proj",), gate_up=("gate_up_proj",), window=WindowSource.CONFIG)
_GLM = replace(_LLAMA, gate_up=("gate_up_proj",), rotary_table=RotaryTable.ADJACENT)
_GRANITE = replace(
    _LLAMA,
    residual_multiplier="residual_multiplier",
    embedding_multiplier="embedding_multiplier",
    logits_divisor="logits_scaling",
)
_HUNYUAN = replace(
    _LLAMA, query_norm="query_layernorm", key_norm="key_layernorm", norm_after_rotary=True
)
_OLMO2 = replace(
    _LLAMA,
    attention_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
    norm_kind=NormKind.RMS,
    query_norm="q_norm",
    key_norm="k_norm",
    norm_spans_heads=True,
)

ARCHITECTURES: Final[dict[str, Architecture]] = {
    "arcee": replace(_LLAMA, gate_up=("up_proj",), is_gated=False),
    "cohere": replace(_COHERE, query_norm="q_norm", key_norm="k_norm"),
    "cohere2": replace(_COHERE, has_rotary="sliding_window", window=WindowSource.ATTENTION),
    "cwm": _WINDOWED,
    "dots1": replace(_QWEN3, experts="experts"),
    "ernie4_5": replace(_LLAMA, rotary_table=RotaryTable.ADJACENT),
    "ernie4_5_moe": replace(_EXPERTS, rotary_table=RotaryTable.ADJACENT),
    "flex_olmo": replace(_OLMO2, experts="experts"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, query_norm="q_norm", key_norm="k_norm"),
    "glm": _GLM,
    "glm4": replace(
        _GLM,
        attention_output_norm="post_self_attn_layernorm",
        mlp_output_norm="post_mlp_layernorm",
    ),
    "glm4_moe": replace(_EXPERTS, query_norm="q_norm", key_norm="k_norm"),
    "gpt_oss": replace(
        _EXPERTS,
        norm_kind=NormKind.RMS,
        rotary_table=RotaryTable.ONCE,
        window=WindowSource.ATTENTION,
        sinks="sinks",
    ),
    "granite": _GRANITE,
    "granitemoe": replace(_GRANITE, mlp="block_sparse_moe", experts="experts"),
    "helium": replace(_LLAMA, rotary_table=RotaryTable.ADJACENT),
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": replace(_HUNYUAN, experts="experts"),
    "jais2": replace(_LAYER_NORM, gate_up=("up_proj",), is_gated=False),
    "llama": _LLAMA,
    "minimax_m2": replace(_EXPERTS, query_norm="q_norm", key_norm="k_norm", norm_spans_heads=True),
    "ministral": _WINDOWED,
    "mistral": replace(_LLAMA, window=WindowSource.CONFIG),
    "mixtral": replace(_EXPERTS, window=WindowSource.CONFIG),
    "nemotron": replace(_LAYER_NORM, norm_offset=1.0, gate_up=("up_proj",), is_gated=False),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, window=WindowSource.ATTENTION),
    "olmoe": replace(
        _EXPERTS,
        query_norm="q_norm",
        key_norm="k_norm",
        norm_spans_heads=True,
        required=(("clip_qkv", None),),
    ),
    "phi": replace(
        _LAYER_NORM,
        is_parallel=True,
        mlp_norm=None,
        final_norm="final_layernorm",
        attention_output="dense",
        query_norm="q_layernorm",
        key_norm="k_layernorm",
        gate_up=("fc1",),
        down="fc2",
        is_gated=False,
    ),
    "phi3": _PHI3,
    "phimoe": replace(_LAYER_NORM, experts="experts"),
    "qwen2": _WINDOWED,
    "qwen2_moe": replace(_WINDOWED, experts="experts"),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, experts="experts"),
    "seed_oss": _LLAMA,
    "smollm3": replace(_WINDOWED, has_rotary="use_rope"),
    "solar_open": _EXPERTS,
    "stablelm": replace(
        _LAYER_NORM, required=(("use_parallel_residual", False), ("qk_layernorm", False))
    ),
    "starcoder2": replace(
        _LAYER_NORM,
        window=WindowSource.CONFIG,
        gate_up=("c_fc",),
        down="c_proj",
        is_gated=False,
    ),
    "vaultgemma": replace(_GEMMA2, attention_output_norm=None, mlp_output_norm=None),
}
"""By `model_type` of the text config."""
