"""Prefill attention by libraries that one may have: FlashAttention 3, FlashInfer.

Owns how a batch is said to each of them. They take the block-major pool as it is, by its strides,
and matter for prompts of many thousand tokens; decoding rows stay with our own kernel, which needs
no plan on the host. Asked for by `--attention-backend` and never taken otherwise; the self-check at
start goes through whichever it is.

**Not run on a GPU yet.** The tests hold the arguments against doubles of the two functions.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from penstock.core.errors import StartupFailed

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.attention import AttentionSpec

TRITON: Final = "triton"
FA3: Final = "fa3"
FLASHINFER: Final = "flashinfer"
WORKSPACE_BYTES: Final = 128 << 20
_HALF: Final = (torch.bfloat16, torch.float16)


class PrefillAttention(Protocol):
    """Attends for the chunks of a batch. Rows see what `AttentionBackend.attend` says."""

    def can(self, spec: AttentionSpec, dtype: torch.dtype) -> bool:
        """Tell whether a layer of that kind is known; ours does it where not."""

    def attend(
        self,
        spec: AttentionSpec,
        query: Tensor,
        cache: tuple[Tensor, Tensor],
        chunks: Chunks,
    ) -> Tensor:
        """Return the output `[T, num_heads, head_dim]` of the chunks' rows."""


class Chunks:
    """Sequences of a batch whose T rows follow each other.

    query_start  [S + 1] int32, from 0 on
    kv_len       [S] int32
    block_table  [S, W] int32
    """

    def __init__(
        self, query_start: Tensor, kv_len: Tensor, block_table: Tensor, max_query_len: int
    ) -> None:
        self.query_start, self.kv_len = query_start, kv_len
        self.block_table, self.max_query_len = block_table, max_query_len


def find_library(name: str) -> PrefillAttention | None:
    """Return the library's attention by name, None for our own.

    Raises: `StartupFailed` when it is not installed.
    """
    if name == TRITON:
        return None
    module = {FA3: "flash_attn_interface", FLASHINFER: "flashinfer"}[name]
    try:
        library = import_module(module)
    except ImportError as error:
        raise StartupFailed(
            f"--attention-backend {name}: the Python module {module} is not there ({error}): "
            "install it, or use --attention-backend triton"
        ) from error
    return Fa3(library) if name == FA3 else FlashInfer(library)


class Fa3:
    """FlashAttention 3: `flash_attn_with_kvcache` over a page table."""

    def __init__(self, library: ModuleType) -> None:
        self._attend: Any = library.flash_attn_with_kvcache

    def can(self, spec: AttentionSpec, dtype: torch.dtype) -> bool:
        """Tell whether a layer is known: none with sinks."""
        return spec.sinks is None and dtype in _HALF and spec.head_dim <= 256

    def attend(
        self, spec: AttentionSpec, query: Tensor, cache: tuple[Tensor, Tensor], chunks: Chunks
    ) -> Tensor:
        """Return the output of the chunks' rows."""
        output: Tensor = self._attend(
            query,
            *cache,
            cache_seqlens=chunks.kv_len,
            page_table=chunks.block_table,
            cu_seqlens_q=chunks.query_start,
            max_seqlen_q=chunks.max_query_len,
            softmax_scale=spec.scale,
            causal=True,
            window_size=(spec.window - 1, 0) if spec.window else (-1, -1),
            softcap=spec.softcap,
        )
        return output


class FlashInfer:
    """FlashInfer's paged prefill. It plans on the host: once for each batch and kind of layer."""

    def __init__(self, library: ModuleType) -> None:
        self._library: Any = library
        self._workspace: Tensor | None = None
        self._planned: tuple[Chunks, dict[tuple[object, ...], Any]] | None = None

    def can(self, spec: AttentionSpec, dtype: torch.dtype) -> bool:
        """Tell whether a layer is known: none with sinks."""
        return spec.sinks is None and dtype in _HALF and spec.head_dim in (64, 128, 256)

    def attend(
        self, spec: AttentionSpec, query: Tensor, cache: tuple[Tensor, Tensor], chunks: Chunks
    ) -> Tensor:
        """Return the output of the chunks' rows."""
        output: Tensor = self._plan(spec, query, cache[0].shape[1], chunks).run(query, cache)
        return output

    def _plan(self, spec: AttentionSpec, query: Tensor, block_size: int, chunks: Chunks) -> Any:  # noqa: ANN401  a wrapper of the library's
        if self._planned is None or self._planned[0] is not chunks:
            self._planned = chunks, {}
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        kind = (*shape, spec.group, spec.scale, spec.window, spec.softcap)
        plans = self._planned[1]
        if kind not in plans:
            if self._workspace is None:
                self._workspace = query.new_empty(WORKSPACE_BYTES, dtype=torch.uint8)
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            wrapper.plan(
                chunks.query_start,
                *_pages(chunks, block_size),
                *shape,
                block_size,
                causal=True,
                sm_scale=spec.scale,
                window_left=spec.window - 1 if spec.window else -1,
                logits_soft_cap=spec.softcap or None,
                q_data_type=query.dtype,
                kv_data_type=query.dtype,
            )
            plans[kind] = wrapper
        return plans[kind]


def _pages(chunks: Chunks, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each sequence's blocks begin in a row of all of them `[S + 1]`, that row, and
    how many slots of each last block are filled `[S]`. Waits for the device.
    """
    counts = (chunks.kv_len + (block_size - 1)) // block_size
    begin = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    begin[1:] = counts.cumsum(0)
    columns = torch.arange(chunks.block_table.shape[1], device=counts.device)
    blocks = chunks.block_table[columns[None] < counts[:, None]]
    return begin, blocks, chunks.kv_len - (counts - 1) * block_size
