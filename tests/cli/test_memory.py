"""A worker's memory on a GPU, put together over a double of the driver: what the tests of transport
and engine show of the parts, together.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.cli.memory import DevicePools, device_memory
from penstock.core.block import KVGroup, KVLayout
from penstock.core.config import EngineConfig
from penstock.core.events import Move, MoveClass, Span
from penstock.core.step import Step
from penstock.core.types import BlockId, RequestId, Role, WorkerId
from penstock.engine.pools import pool_shape
from penstock.runtime.link import WorkerSpec
from penstock.runtime.settings import ClusterSettings, ModelFacts
from penstock.runtime.worker import WorkerPlace
from penstock.transfer.digest import take_digests
from penstock.transport.cuda_driver import CudaDriver
from tests.transport.cuda_double import allocate, build_double, memory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on a GPU then")
LAYOUT = KVLayout("m", (KVGroup((0, 1)),), 2, 32, 8, "bfloat16")
FACTS = ModelFacts(
    folder="",
    layout=LAYOUT,
    num_blocks=(6,),
    max_model_len=48,
    eos_token_ids=(0,),
    vocab_size=100,
    description="",
)
W = WorkerId("w")


def test_blocks_of_a_gpu_are_described_digested_and_moved(tmp_path: Path):
    library = str(build_double(tmp_path))
    blocks = memory(*allocate(library, 0, [(6, LAYOUT.block_bytes[0])]))
    blocks[:] = np.random.default_rng(0).integers(0, 256, blocks.shape, np.uint8)
    pool = torch.from_numpy(blocks).view(torch.bfloat16).view(pool_shape(LAYOUT, 0, 6))
    found = device_memory(
        ClusterSettings(engine=EngineConfig(model="m")),
        FACTS,
        WorkerSpec(worker_id=W, role=Role.MIXED, epoch=1, index=0),
        WorkerPlace(folder=tmp_path, controller_address="", front_fd=0),
        DevicePools((pool,), 0, lambda: CudaDriver(library)),
    )
    # The pool is the GPU's, and what counts its generations is the host's.
    first, second = (region.kind for region in found.regions)
    assert (first, second) == ("cuda_ipc", found.regions[1].kind)
    assert second != "cuda_ipc"
    assert [len(counts) for counts in found.generations] == [6]
    assert found.tensors()[0].data_ptr() == pool.data_ptr()

    one, table = np.ones(1, np.int32), np.zeros((1, 1), np.int32)
    step = Step(1, np.zeros(1, np.int64), one, one, (table,), (), ((BlockId(4),),))
    assert found.digest(step) == (take_digests(blocks, [4]),)

    wanted = blocks[1].copy()
    done = found.move(
        Move(
            move_id=1,
            kind=MoveClass.RELOCATE,
            request_id=RequestId(""),
            source=W,
            epoch=1,
            spans=((Span(BlockId(1), BlockId(5), 1),),),
        )
    )
    assert done.error is None, done
    assert np.array_equal(blocks[5], wanted)
