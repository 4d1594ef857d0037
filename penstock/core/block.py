"""What a KV block is: its shape in memory, its name by content, and the states it goes through.

A block is one contiguous span of one group's block-major pool,

    [num_blocks, layers_in_group, 2, block_size, num_kv_heads, head_dim]

and is the unit of allocation, hashing, compression and transfer in every tier. Layers that attend
to everything and layers that attend to a sliding window lie in different groups, so that the latter
can free what is behind their window. This module computes sizes and names; it holds no memory and
knows no owner.
"""

from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from struct import pack
from typing import Final

from msgspec import Struct
from msgspec.msgpack import encode

from penstock.core.types import BlockHash

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_CONTENT: Final = ("model", "groups of layers", "total_kv_heads", "head_dim")


class KVGroup(Struct, frozen=True, array_like=True):
    """Layers that keep the same tokens: `window` is 0 for full attention, else the sliding window
    in tokens.
    """

    layers: tuple[int, ...]
    window: int = 0


class KVLayout(Struct, frozen=True, array_like=True):
    """Shape of every block of a worker, and which part of a token's KV is in it.

    `model` identifies weights and revision: blocks of different models never mix even when shapes
    agree. A worker of a tensor-parallel group holds `num_kv_heads` of the model's `total_kv_heads`
    from `first_kv_head` on; a total of 0 is no more than are here. Blocks of layouts with the same
    fingerprint are copied as they are, those of layouts that are not incompatible by way of
    `transfer/reshape.py`.
    """

    model: str
    groups: tuple[KVGroup, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    first_kv_head: int = 0
    total_kv_heads: int = 0

    def __post_init__(self) -> None:
        """Check what a peer may say of itself. Raises: `ValueError` for what no pool can have."""
        sizes = (self.num_kv_heads, self.head_dim, self.block_size)
        if min(sizes) < 1 or self.first_kv_head < 0 or self.dtype not in DTYPE_BYTES:
            raise ValueError(f"no pool has this shape: {self}")
        if self.kv_heads.stop > self._num_heads:
            raise ValueError(f"KV heads {self.kv_heads} of {self._num_heads}: {self}")

    @property
    def kv_heads(self) -> range:
        """The model's KV heads that lie in these blocks."""
        return range(self.first_kv_head, self.first_kv_head + self.num_kv_heads)

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block, per group."""
        slot = 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]
        return tuple(len(group.layers) * self.block_size * slot for group in self.groups)

    @property
    def token_bytes(self) -> int:
        """Bytes of KV per token over all groups, as long as no window has been left behind."""
        return sum(self.block_bytes) // self.block_size

    def fingerprint(self) -> str:
        """Return 16 hex digits of the exact shape: where they agree, blocks are exchanged as they
        are.
        """
        return blake2b(encode(self), digest_size=8).hexdigest()

    def incompatibility(self, other: "KVLayout") -> str | None:
        """Return why KV of `other` is of no use here in any shape, with both fingerprints, or None.

        What must agree is what was computed: model, layers and windows, heads in all, head size.
        How it is stored (block size, dtype, which heads) may differ.
        """
        for name, ours, theirs in zip(_CONTENT, self._content, other._content, strict=True):
            if ours != theirs:
                return (
                    f"layouts {self.fingerprint()} (ours) and {other.fingerprint()} (theirs) do "
                    f"not go together: {name} is {ours} here and {theirs} there"
                )
        return None

    @property
    def _content(self) -> tuple[object, ...]:
        """What two layouts must have in common, in the order of `_CONTENT`."""
        return self.model, self.groups, self._num_heads, self.head_dim

    @property
    def _num_heads(self) -> int:
        return self.total_kv_heads or self.num_kv_heads

    def capacity_tokens(self, num_blocks: Sequence[int]) -> int:
        """Tokens whose KV fits at once into pools of `num_blocks` per group.

        Counted in the full-attention group that fills first; a sliding window never fills up.
        """
        groups = zip(self.groups, num_blocks, strict=True)
        full = [count for group, count in groups if not group.window]
        return min(full or num_blocks) * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one full-attention group."""
        return -(-num_tokens // self.block_size)


_NAME_BYTES: Final = 15
_EXACT, _LOSSY = b"\0", b"\1"
"""The last byte of a name, which children have from their parents."""


@lru_cache(maxsize=1024)
def root_hash(salt: str, *, accepts_loss: bool = False, kv_window: int = 0) -> BlockHash:
    """Return the parent of a sequence's first block: depends on the tenant's salt, on whether
    KV may come back changed by a lossy codec, and on the window that decoding looks at (0: all).

    The same salt gives the same hash in every process (no random seed), which is what lets workers,
    router and restarts agree on names.
    """
    person = b"penstock-lossy" if accepts_loss else b"penstock-root"
    # What decoding computes behind a window is no function of all tokens: names of its own.
    window = kv_window.to_bytes(8, "little") if kv_window else b""
    digest = blake2b(salt.encode(), digest_size=_NAME_BYTES, person=person, salt=window).digest()
    return BlockHash(digest + (_LOSSY if accepts_loss else _EXACT))


def accepts_loss(name: BlockHash) -> bool:
    """Tell whether a block's content, and that of all before it, may have been through a lossy
    codec: such names are only ever asked for by requests that accept loss.
    """
    return name[-1:] == _LOSSY


def block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Name a full block by its tokens and everything before it. O(block_size)."""
    return name_block(parent, pack(f"<{len(token_ids)}I", *token_ids))


def name_block(parent: BlockHash, token_bytes: bytes) -> BlockHash:
    """Name a full block whose tokens are given as little-endian 32-bit numbers."""
    digest = blake2b(token_bytes, digest_size=_NAME_BYTES, key=parent).digest()
    return BlockHash(digest + parent[_NAME_BYTES:])


def extend_hashes(
    hashes: list[BlockHash],
    token_ids: Sequence[int],
    block_size: int,
    salt: str,
    *,
    accepts_loss: bool = False,
    kv_window: int = 0,
) -> None:
    """Append the hashes of blocks that `token_ids` fills and `hashes` does not name yet.

    `hashes[i]` names tokens `[i * block_size, (i + 1) * block_size)`; a partial last block has no
    name.
    """
    root = root_hash(salt, accepts_loss=accepts_loss, kv_window=kv_window)
    parent = hashes[-1] if hashes else root
    named = token_ids[len(hashes) * block_size : len(token_ids) // block_size * block_size]
    data = pack(f"<{len(named)}I", *named)
    for start in range(0, len(data), 4 * block_size):
        parent = name_block(parent, data[start : start + 4 * block_size])
        hashes.append(parent)


class BlockState(Enum):
    """States of a block in its pool; `BLOCK_TRANSITIONS` is the whole life.

    FREE      in the allocator
    ACTIVE    held by at least one request; slots are being filled, or it is full and named
    CACHED    full, named and held by nobody: kept for prefix hits until evicted
    """

    FREE = "free"
    ACTIVE = "active"
    CACHED = "cached"


BLOCK_TRANSITIONS: Final[dict[BlockState, frozenset[BlockState]]] = {
    BlockState.FREE: frozenset({BlockState.ACTIVE}),
    BlockState.ACTIVE: frozenset({BlockState.FREE, BlockState.CACHED}),
    BlockState.CACHED: frozenset({BlockState.ACTIVE, BlockState.FREE}),
}
