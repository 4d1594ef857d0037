"""Makes the rotary tables of a flat decoder from a Hugging Face rotary module.

Owns the four ways in which Hugging Face lays out cosines and sines. Any scaling is in the module's
own numbers, asked for the whole context at once. `lift` calls it.
"""

from __future__ import annotations

from inspect import signature

import torch

from penstock.engine.architectures import LiftFailed, RotaryTable
from penstock.engine.hugging_face import HfModule
from penstock.engine.kernels import Rotary


class RotaryTables:
    """The tables of one model, each made once: layers of a kind share it."""

    def __init__(
        self, base: HfModule, form: RotaryTable, max_positions: int, dtype: torch.dtype
    ) -> None:
        """Read the rotary module of a decoder; tables get `max_positions` rows.

        Raises: `LiftFailed` when there is none.
        """
        self._module, self._form = getattr(base, "rotary_emb", None), form
        if self._module is None:
            raise LiftFailed(f"{type(base).__name__} has no part rotary_emb")
        by_type = "layer_type" in signature(self._module.forward).parameters
        self._layer_types: list[str] | None = base.config.layer_types if by_type else None
        # The module's own device: where the model is.
        device = next(self._module.buffers()).device
        self._positions, self._dtype = torch.arange(max_positions, device=device)[None], dtype
        self._tables: dict[str | None, Rotary] = {}

    def of_layer(self, index: int, head_dim: int) -> Rotary:
        """Return the table of a layer.

        Raises: `LiftFailed` when it turns more than a head.
        """
        layer_type = None if self._layer_types is None else self._layer_types[index]
        if layer_type not in self._tables:
            table = self._make(layer_type)
            if 2 * table.cos.shape[1] > head_dim:
                raise LiftFailed(f"{table.cos.shape[1]} pairs do not fit {head_dim} elements")
            self._tables[layer_type] = table
        return self._tables[layer_type]

    def _make(self, layer_type: str | None) -> Rotary:
        assert self._module is not None
        # The module returns this tensor's dtype: rounded as Hugging Face does before it multiplies.
        like = self._positions.new_zeros(1, dtype=self._dtype)
        arguments = () if layer_type is None else (layer_type,)
        tables = self._module(like, self._positions, *arguments)
        cos, sin = (table[0].float() for table in tables)
        half = cos.shape[-1] // 2
        match self._form:
            case RotaryTable.ONCE:
                pick, interleaved = slice(None), False
            case RotaryTable.HALVES:
                pick, interleaved = slice(half), False
            case RotaryTable.ADJACENT:
                pick, interleaved = slice(half), True
            case RotaryTable.REPEATED:
                pick, interleaved = slice(None, None, 2), True
        return Rotary(cos[:, pick].contiguous(), sin[:, pick].contiguous(), interleaved)
