"""Turn a loaded Hugging Face model into a flat decoder, by the table of architectures.

Owns the reading of Hugging Face modules. A module's weights are packed and its plain ones let go
before the next is touched, so the peak is one model and one layer. The model is unusable
afterwards. `load_model` calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from penstock.engine.architectures import ARCHITECTURES, Architecture, LiftFailed, WindowSource
from penstock.engine.attention import AttentionSpec
from penstock.engine.decoder import (
    Decoder,
    DenseMlp,
    Layer,
    OpaqueMlp,
    group_layers,
    place_layers,
)
from penstock.engine.experts import EAGER, GROUPED, choose_experts
from penstock.engine.hugging_face import HfModule
from penstock.engine.kernels import Activation, HeadsSpec, Norm, NormKind
from penstock.engine.linear import Linear
from penstock.engine.packed import pack_linears
from penstock.engine.rotary import RotaryTables

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
}


def find_architecture(config: PreTrainedConfig) -> Architecture | None:
    """Return a model's row, or None where it is not declared or its config is not the row's."""
    config = config.get_text_config()
    row = ARCHITECTURES.get(config.model_type)
    if row is None or any(getattr(config, key, None) != value for key, value in row.required):
        return None
    return row


def lift(
    model: PreTrainedModel,
    row: Architecture,
    max_model_len: int,
    progress: Callable[[float], None] = lambda _: None,
) -> Decoder:
    """Take over the weights of a model whose architecture is `row`.

    `progress` is told the share of layers done.

    Raises: `LiftFailed` when a part is missing, of another kind, or not in the row.
    """
    return _Lift(model, row, max_model_len).run(progress)


@dataclass(slots=True)
class _Lift:
    model: PreTrainedModel
    row: Architecture
    max_model_len: int
    experts: str = EAGER

    def run(self, progress: Callable[[float], None]) -> Decoder:
        row, config = self.row, self.config
        model: HfModule = self.model
        if row.experts is not None:
            self.experts = choose_experts(self.model)
        base = model.get_decoder()
        windows = [self._window(_part(layer, row.attention)) for layer in base.layers]
        places = place_layers(group_layers(windows))
        rotary = RotaryTables(base, row.rotary_table, self.max_model_len, model.dtype)
        layers = []
        for index, window in enumerate(windows):
            layers.append(self._layer(base.layers[index], rotary, *places[index], window))
            base.layers[index] = nn.Identity()
            progress((index + 1) / len(windows))
        embedding, head_module = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head_module.weight is embedding.weight
        head = Linear(head_module.weight.detach(), _bias(head_module), out_dtype=torch.float32)
        return Decoder(
            embedding=head if is_tied else embedding.weight.detach(),
            embedding_scale=self._rounded(
                _number(row.embedding_multiplier, 1.0, config, embedding)
            ),
            layers=tuple(layers),
            final_norm=self._norm(_part(base, row.final_norm)),
            head=head,
            logits_scale=_number(row.logits_scale, 1.0, config)
            / _number(row.logits_divisor, 1.0, config),
            logits_softcap=_number(row.logits_softcap, 0.0, config),
        )

    @property
    def config(self) -> HfModule:
        return self.model.config.get_text_config()

    def _rounded(self, value: float) -> float:
        """Round as the model does before it multiplies."""
        return float(torch.tensor(value).to(self.model.dtype))

    def _window(self, attention: nn.Module) -> int:
        match self.row.window:
            case WindowSource.NONE:
                window = None
            case WindowSource.ATTENTION:
                window = getattr(attention, "sliding_window", None)
            case WindowSource.CONFIG:
                window = getattr(self.config, "sliding_window", None)
        # A window that no sequence outgrows is none: its layers need no pool of their own.
        return 0 if window is None or window >= self.max_model_len else int(window)

    def _layer(
        self, layer: nn.Module, rotary: RotaryTables, group: int, plane: int, window: int
    ) -> Layer:
        row = self.row
        attention: HfModule = _part(layer, row.attention)
        mlp = _part(layer, row.mlp)
        norms = (
            row.attention_norm,
            row.attention_output_norm,
            row.mlp_norm,
            row.mlp_output_norm,
        )
        _check_covered(layer, {row.attention, row.mlp, *norms})
        attention_norm, attention_output_norm, mlp_norm, mlp_output_norm = (
            None if name is None else self._norm(_part(layer, name)) for name in norms
        )
        heads = self._heads(attention, group, plane, window)
        has_rotary = row.has_rotary is None or bool(getattr(attention, row.has_rotary))
        heads_spec = HeadsSpec(
            attention=heads,
            rotary=rotary.of_layer(attention.layer_idx, heads.head_dim) if has_rotary else None,
            query_norm=self._optional_norm(attention, row.query_norm),
            key_norm=self._optional_norm(attention, row.key_norm),
            norm_spans_heads=row.norm_spans_heads,
            norm_after_rotary=row.norm_after_rotary,
        )
        qkv = _linear(attention, row.qkv)
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        if qkv.out_features != width:
            raise LiftFailed(f"query, key and value have {qkv.out_features} rows, not {width}")
        return Layer(
            attention_norm=attention_norm,
            qkv=qkv,
            heads=heads_spec,
            attention_output=_linear(attention, (row.attention_output,)),
            attention_output_norm=attention_output_norm,
            mlp_norm=mlp_norm,
            mlp=self._mlp(mlp),
            mlp_output_norm=mlp_output_norm,
            is_parallel=row.is_parallel,
            residual_multiplier=_number(row.residual_multiplier, 1.0, self.config),
        )

    def _heads(self, attention: HfModule, group: int, plane: int, window: int) -> AttentionSpec:
        row, config = self.row, self.config
        _check_covered(attention, {*row.qkv, row.attention_output, row.query_norm, row.key_norm})
        sinks = None if row.sinks is None else getattr(attention, row.sinks).detach().float()
        return AttentionSpec(
            group=group,
            layer_in_group=plane,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scale=float(attention.scaling),
            window=window,
            softcap=_number(row.softcap, 0.0, config),
            sinks=sinks,
        )

    def _optional_norm(self, attention: nn.Module, name: str | None) -> Norm | None:
        # Cohere has head norms or not, as its config says; `_check_covered` finds one missed.
        module = None if name is None else getattr(attention, name, None)
        return None if module is None else self._norm(module)

    def _norm(self, module: HfModule) -> Norm:
        row = self.row
        weight, bias = module.weight.detach(), _bias(module)
        if row.norm_kind is not NormKind.RMS_LLAMA:
            weight = weight.float() + row.norm_offset
        eps = getattr(module, row.norm_eps, None)
        if eps is None:
            raise LiftFailed(f"{type(module).__name__} has no {row.norm_eps}")
        return Norm(row.norm_kind, weight.flatten().contiguous(), float(eps), bias)

    def _mlp(self, mlp: nn.Module) -> DenseMlp | OpaqueMlp:
        row = self.row
        if row.experts is not None and hasattr(mlp, row.experts):
            pack_linears(mlp)
            return OpaqueMlp(_rows_function(mlp), is_capturable=self.experts == GROUPED)
        # The activation is taken from the config by name; its module has no weights.
        _check_covered(mlp, {*row.gate_up, row.down})
        name = getattr(self.config, row.activation)
        if name not in _ACTIVATIONS:
            raise LiftFailed(f"activation {name}")
        gate_up, down = _linear(mlp, row.gate_up), _linear(mlp, (row.down,))
        if gate_up.out_features != down.in_features * (2 if row.is_gated else 1):
            raise LiftFailed(f"{gate_up.out_features} into {down.in_features} MLP features")
        return DenseMlp(gate_up, down, _ACTIVATIONS[name], row.is_gated)


def _part(owner: nn.Module, name: str) -> nn.Module:
    part = getattr(owner, name, None)
    if not isinstance(part, nn.Module):
        raise LiftFailed(f"{type(owner).__name__} has no part {name}")
    return part


def _check_covered(owner: nn.Module, known: set[str | None]) -> None:
    """Refuse a module with weights in a part that the row does not name."""
    for name, child in owner.named_children():
        if name not in known and next(child.parameters(), None) is not None:
            raise LiftFailed(f"{type(owner).__name__} has an unknown part {name}")


def _linear(owner: nn.Module, names: tuple[str, ...]) -> Linear:
    """Pack one or several products over the same input and let their plain weights go."""
    parts: list[tuple[Tensor, Tensor | None]] = []
    for name in names:
        module: Any = _part(owner, name)
        if not isinstance(module, nn.Linear):
            raise LiftFailed(f"{name} is a {type(module).__name__}")
        parts.append((module.weight.detach(), _bias(module)))
    packed = Linear(*parts[0]) if len(parts) == 1 else Linear.stacked(*parts)
    for name in names:
        setattr(owner, name, None)
    return packed


def _bias(module: HfModule) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _number(name: str | None, default: float, *owners: HfModule) -> float:
    """Return the first owner's value of that name; None, or no such name, is the default."""
    for owner in owners:
        value = None if name is None else getattr(owner, name, None)
        if value is not None:
            return float(value)
    return default


def _rows_function(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a block over `[1, T, width]` as a function over rows."""

    def run(x: Tensor) -> Tensor:
        output = module(x[None])
        rows: Tensor = output[0] if isinstance(output, tuple) else output
        return rows[0]

    return run
