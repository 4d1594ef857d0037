"""What moves a worker's blocks when its pools are on a GPU, put together from transport and engine.

Pools as regions and as what peers may know of them, the way between GPUs, digests and codecs that
run where the blocks are. Knows no worker core. For the composition root of a worker's process,
which makes it in that process: CUDA does not survive a fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.core.descriptors import RegionDescriptor
from penstock.engine.device_codec import PoolCodec
from penstock.engine.device_digest import DeviceDigests
from penstock.engine.triton.codecs import TRITON_CODECS
from penstock.transfer.digest import TakeDigests
from penstock.transport.cuda_driver import CudaDriver, Driver
from penstock.transport.cuda_ipc import CudaIpc, CudaRegion, describe
from penstock.transport.device_tiers import DeviceCodec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMoves:
    """For each KV group its pool as a region, as peers see it, and what takes its digests.

    `way` leads to pools of peers on GPUs of this host. `make_driver` gives a stream of its own each
    time it is called, `make_codec` a codec of the first group's blocks on the device, or None.
    """

    regions: tuple[CudaRegion, ...]
    descriptors: tuple[RegionDescriptor, ...]
    takes: tuple[TakeDigests, ...]
    way: CudaIpc
    make_driver: Callable[[], Driver]
    make_codec: Callable[[str], DeviceCodec | None]


def device_moves(
    pools: Sequence[Tensor],
    *,
    device: int = 0,
    make_driver: Callable[[], Driver] = CudaDriver,
    allocate: Callable[[int, int], Tensor] | None = None,
) -> DeviceMoves:
    """Return what moves blocks of `pools`, one for each group as `penstock.core.block` draws it.

    They must not be freed while peers may read them. `allocate` gives memory of the device, rows by
    bytes of each; torch's where it is not given.
    Raises: `BackendUnavailable` without a driver, or for memory that cannot be shared.
    """
    driver = make_driver()
    regions = tuple(_region(pool, device) for pool in pools)

    def make_codec(name: str) -> DeviceCodec | None:
        if name not in TRITON_CODECS:
            return None
        codec = PoolCodec(name, pools[0], allocate=allocate)
        return StagedCodec(codec, _region(codec.rows, device))

    return DeviceMoves(
        regions=regions,
        descriptors=tuple(describe(driver, region, os.getpid()) for region in regions),
        takes=tuple(DeviceDigests(pool).take for pool in pools),
        way=CudaIpc(make_driver(), device),
        make_driver=make_driver,
        make_codec=make_codec,
    )


@dataclass(frozen=True, slots=True, eq=False)
class StagedCodec:
    """A codec over a pool, with its rows as memory that is copied: `DeviceCodec`."""

    codec: PoolCodec
    staging: CudaRegion

    @property
    def name(self) -> str:
        """The method's name."""
        return self.codec.name

    @property
    def encoded_bytes(self) -> int:
        """Bytes of an encoded block."""
        return self.codec.encoded_bytes

    def encode(self, block_ids: Sequence[int]) -> None:
        """Encode block `block_ids[i]` into row i; return when that is done."""
        self.codec.encode(block_ids)

    def decode(self, block_ids: Sequence[int]) -> None:
        """Decode row i into block `block_ids[i]`; return when that is done."""
        self.codec.decode(block_ids)


def _region(pool: Tensor, device: int) -> CudaRegion:
    assert pool.is_contiguous(), pool.stride()
    block_bytes = pool[0].numel() * pool.element_size()
    return CudaRegion(device, pool.data_ptr(), len(pool), block_bytes)
