"""Runs any Hugging Face decoder on block pools, its own code untouched.

Owns the adapter between Hugging Face's attention interface and ours: a batch goes in as one flat
row `(1, T)` with position ids, masks are switched off, and every attention call is answered from
the pools. What a layer attends to is what its call says (window, softcap, sinks, scale), learnt
from one probing run. Does not know architectures. `load_model` makes one where the flat decoder
does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from penstock.core.errors import StartupFailed
from penstock.engine.attention import AttentionSpec
from penstock.engine.decoder import cache_views, group_layers, place_layers, windows_below
from penstock.engine.packed import pack_linears

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from penstock.engine.batch import Batch
    from penstock.engine.kernels import Kernels

_INTERFACE: Final = "penstock"
_CallValue = Any

HfModule = Any
"""A module of Hugging Face's: no type says what it has, the self-check shows that it was there."""


@dataclass(slots=True, eq=False)
class _Router:
    """Where the attention calls of a model go: every module of it holds the same router.

    `answer` takes the module, query, key and value `[1, heads, T, head_dim]` and the call's
    keywords, and returns `[1, T, num_heads, head_dim]`.
    """

    answer: Callable[[Any, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class HuggingFaceModel:
    """A Hugging Face model and what its layers attend to, in the order in which they are called."""

    model: PreTrainedModel
    attention: tuple[AttentionSpec, ...]
    router: _Router

    @classmethod
    def adopt(
        cls, model: PreTrainedModel, max_model_len: int, *, packs: bool = True
    ) -> HuggingFaceModel:
        """Route a model's attention through pools; it cannot run on its own any more.

        With `packs`, its linear layers are laid out for the machine.

        Raises: `StartupFailed` when a layer keeps anything but plain keys and values.
        """
        if packs:
            pack_linears(model)
        attention, router = _probe(model)
        windows = [0 if spec.window >= max_model_len else spec.window for spec in attention]
        places = place_layers(group_layers(windows))
        specs = tuple(
            replace(spec, group=group, layer_in_group=plane, window=window)
            for spec, (group, plane), window in zip(attention, places, windows, strict=True)
        )
        return cls(model, specs, router)

    def bind(self, kernels: Kernels, pools: Sequence[Tensor]) -> Callable[[Batch], Tensor]:
        """Return what computes logits `[R, vocab_size]` float32 of batches with KV in `pools`."""
        caches = cache_views(self.attention, pools)
        model: Any = self.model
        selects_rows = "logits_to_keep" in signature(model.forward).parameters

        def run(batch: Batch) -> Tensor:
            layers = zip(self.attention, caches, strict=True)

            def answer(
                _: HfModule, query: Tensor, key: Tensor, value: Tensor, __: dict[str, Any]
            ) -> Tensor:
                spec, cache = next(layers)
                query, key, value = (_rows(tensor) for tensor in (query, key, value))
                kernels.store(key, value, *cache, batch.slots[spec.group])
                return kernels.attend(spec, query, *cache, batch)[None]

            self.router.answer = answer
            keep = {"logits_to_keep": batch.logits_rows} if selects_rows else {}
            with torch.inference_mode():
                logits: Tensor = model(
                    input_ids=batch.token_ids[None],
                    position_ids=batch.positions[None],
                    use_cache=False,
                    **keep,
                ).logits[0]
                return (logits if selects_rows else logits[batch.logits_rows]).float()

        return run

    def with_windows_below(self, limit: int) -> HuggingFaceModel:
        """Return the same model with no window above `limit`, weights shared."""
        return replace(self, attention=tuple(windows_below(limit, self.attention)))


def _probe(model: HfModule) -> tuple[list[AttentionSpec], _Router]:
    """Run two tokens through the model and note what every attention call asks for."""
    kind = model.config.model_type
    if not model._supports_attention_backend:
        raise StartupFailed(
            f"{kind} models compute attention in their own code, which knows no block tables; "
            "they are not supported"
        )
    specs: dict[Any, AttentionSpec] = {}

    def answer(
        module: HfModule, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]
    ) -> Tensor:
        if module in specs or key.shape != value.shape or not getattr(module, "is_causal", True):
            raise StartupFailed(
                f"{kind} models have attention (shared between layers, latent or not causal) "
                "that is not supported"
            )
        specs[module] = _spec(query, key, call)
        return query.transpose(1, 2)

    AttentionInterface.register(_INTERFACE, _attention)
    AttentionMaskInterface.register(_INTERFACE, _no_mask)
    router = _Router(answer)
    for module in model.modules():
        module.penstock_router = router
    model.set_attn_implementation(_INTERFACE)
    ids = torch.arange(2, device=model.device)[None]
    with torch.inference_mode():
        model(input_ids=ids, position_ids=ids, use_cache=False)
    num_layers = model.config.get_text_config().num_hidden_layers
    if len(specs) != num_layers:
        raise StartupFailed(
            f"{len(specs)} of the {num_layers} layers of {kind} models keep keys and values; "
            "models that mix in other kinds of state are not supported"
        )
    return list(specs.values()), router


def _spec(query: Tensor, key: Tensor, call: dict[str, Any]) -> AttentionSpec:
    """Read a call. Only its keywords count: a module may have a window that it does not apply."""
    head_dim = query.shape[-1]
    scale, sinks = call.get("scaling"), call.get("s_aux")
    return AttentionSpec(
        group=0,
        layer_in_group=0,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else float(scale),
        window=int(call.get("sliding_window") or 0),
        softcap=float(call.get("softcap") or 0.0),
        sinks=None if sinks is None else sinks.detach().float(),
    )


def _rows(heads: Tensor) -> Tensor:
    """Return `[1, heads, T, head_dim]` as contiguous `[T, heads, head_dim]`."""
    return heads[0].transpose(0, 1).contiguous()


def _attention(
    module: HfModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    **call: _CallValue,
) -> tuple[Tensor, None]:
    """Answer a call of Hugging Face's attention interface."""
    return module.penstock_router.answer(module, query, key, value, call), None


def _no_mask(*_: _CallValue, **__: _CallValue) -> None:
    """Answer a call of Hugging Face's mask interface: back ends know what a row sees."""
