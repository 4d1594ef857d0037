"""CUDA IPC: with a double of the driver's library between two real processes, and on GPUs."""

import ctypes
import os
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from penstock.core.descriptors import RegionDescriptor
from penstock.core.errors import BackendUnavailable, DeadlineExceeded, PeerLost
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory, Region
from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.cuda_ipc import CudaIpc, CudaLocation, CudaRegion, cuda_region, describe
from tests.transport import cuda_double
from tests.transport.cuda_double import build_double, memory

ROOT = Path(__file__).parents[2]
NUM_BLOCKS, BLOCK_BYTES = 64, 4096


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build_double(tmp_path_factory.mktemp("double"))


@pytest.fixture
def driver(library) -> CudaDriver:
    return CudaDriver(str(library))


@pytest.fixture
def owner(library):
    process = start(OWNER, str(library))
    yield process
    process.kill()
    process.communicate()


OWNER = """
import ctypes, os, sys
import msgspec
import numpy as np
from tests.transport.test_cuda_ipc import allocate, filled
from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.cuda_ipc import describe

driver = CudaDriver(sys.argv[1])
regions = allocate(sys.argv[1], device=1, num_regions=2)
for seed, region in enumerate(regions):
    contents = filled(seed)
    ctypes.memmove(region.address, contents.ctypes.data, contents.nbytes)
print(msgspec.json.encode([describe(driver, r, os.getpid()) for r in regions]).decode(), flush=True)
sys.stdin.read()
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def memory_of(process: subprocess.Popen[str], epoch: int = 1) -> PeerMemory:
    line = process.stdout.readline()
    return PeerMemory("p", epoch, msgspec.json.decode(line, type=tuple[RegionDescriptor, ...]))


def filled(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8)


def allocate(library: str, device: int = 0, num_regions: int = 1) -> list[CudaRegion]:
    return cuda_double.allocate(library, device, num_regions * [(NUM_BLOCKS, BLOCK_BYTES)])


def contents_of(region: CudaRegion) -> np.ndarray:
    return memory(region).copy()


def mapped(library: Path) -> int:
    return ctypes.CDLL(str(library)).double_mapped()


@pytest.mark.parametrize("device", [1, 0])
def test_blocks_cross_between_processes_on_one_device_and_between_two(
    library, driver, owner, device
):
    way, into = CudaIpc(driver, device), allocate(str(library), device)[0]
    memory, before = memory_of(owner), mapped(library)
    order = np.random.default_rng(3).permutation(NUM_BLOCKS)
    for index in (0, 1):
        source = way.open(memory, index)
        described = (source.name, source.num_blocks, source.block_bytes)
        assert described == ("cuda_ipc", NUM_BLOCKS, BLOCK_BYTES)
        source.pull(into, cut(order, np.arange(NUM_BLOCKS)))
        assert (contents_of(into) == filled(index)[order]).all()
        source.pull(into, cut(np.arange(8, 24), np.arange(16)))
        assert (contents_of(into)[:16] == filled(index)[8:24]).all()
    way.close()
    assert mapped(library) == before
    with pytest.raises(PeerLost, match="forgotten"):
        source.pull(into, cut([0], [0]))


def test_an_owner_that_ended_is_lost_also_when_its_memory_is_still_mapped(library, driver, owner):
    way, into, memory = CudaIpc(driver, 0), allocate(str(library))[0], memory_of(owner)
    source = way.open(memory, 0)
    source.pull(into, cut([1], [1]))
    owner.kill()
    owner.wait()
    with pytest.raises(PeerLost, match="is gone"):
        source.pull(into, cut([2], [2]))
    assert not contents_of(into)[2].any()
    with pytest.raises(PeerLost, match="is gone"):
        way.open(memory, 1)
    way.close()


def test_a_peer_that_came_back_keeps_what_is_its_own(library, driver, owner):
    way, into, memory = CudaIpc(driver, 0), allocate(str(library))[0], memory_of(owner)
    old, before = way.open(memory, 0), mapped(library)
    new = way.open(msgspec.structs.replace(memory, epoch=2), 0)
    way.forget("p", 1)
    assert mapped(library) == before
    with pytest.raises(PeerLost, match="forgotten"):
        old.pull(into, cut([0], [0]))
    new.pull(into, cut([0], [0]))
    assert (contents_of(into)[0] == filled(0)[0]).all()
    way.close()


def test_another_process_of_the_same_number_is_not_the_owner(library, driver, owner):
    way, memory = CudaIpc(driver, 0), memory_of(owner)
    location = msgspec.json.decode(memory.regions[0].location, type=CudaLocation)
    assert location.pid == owner.pid
    earlier = msgspec.structs.replace(location, started=location.started - 1)
    with pytest.raises(PeerLost, match="is gone"):
        way.open(_with(memory, location=msgspec.json.encode(earlier).decode()), 0)


def test_what_does_not_describe_a_pool_is_refused(library, driver, owner):
    way, memory = CudaIpc(driver, 0), memory_of(owner)
    location = msgspec.json.decode(memory.regions[0].location, type=CudaLocation)
    before = mapped(library)
    larger = (2 * NUM_BLOCKS + 1) * BLOCK_BYTES
    beyond = msgspec.structs.replace(location, offset=2 * NUM_BLOCKS * BLOCK_BYTES)
    cases = {
        "not on a GPU": {"kind": "memfd"},
        "makes no sense": {"location": "1:2:3"},
        "does not describe": {"location": _text(location, handle="ab")},
        "does not": {"location": _text(location, offset=-1)},
        "describe a pool": {"block_bytes": 7},
        "not inside its allocation": {"capacity_bytes": larger},
        "inside its allocation": {"location": msgspec.json.encode(beyond).decode()},
        "cuIpcOpenMemHandle_v2 says": {"location": _text(location, handle=secrets.token_hex(64))},
    }
    for message, changes in cases.items():
        with pytest.raises(PeerLost, match=message):
            way.open(_with(memory, **changes), 0)
    assert mapped(library) == before


def test_gpus_that_do_not_reach_each_other_and_memory_of_the_host(
    library, driver, owner, monkeypatch
):
    memory = memory_of(owner)
    source = CudaIpc(driver, 1).open(memory, 0)
    with pytest.raises(PeerLost, match="memory of a GPU"):
        source.pull(Region(np.zeros((4, BLOCK_BYTES), np.uint8)), cut([0], [0]))
    monkeypatch.setenv("DOUBLE_APART", "1")
    with pytest.raises(PeerLost, match="GPU 0 does not reach GPU 1"):
        CudaIpc(driver, 0).open(memory, 0)
    CudaIpc(driver, 1).open(memory, 0)


def test_a_device_without_an_end_has_a_deadline_and_nothing_follows_it(library, driver, owner):
    way, into = CudaIpc(driver, 0, silence_s=0.2), allocate(str(library))[0]
    source, cuda = way.open(memory_of(owner), 0), ctypes.CDLL(str(library))
    before = mapped(library)
    cuda.double_stick(1)
    try:
        for message in ("without an end", "not ended an earlier copy"):
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=message):
                source.pull(into, cut([3], [3]))
            assert time.monotonic() < started + 5
        way.forget("p", 1)
        assert mapped(library) == before, "what a copy reads was unmapped under it"
    finally:
        cuda.double_stick(0)
    way.close()


def test_an_owner_that_ends_during_a_copy_is_lost(library, driver, owner):
    way, into = CudaIpc(driver, 0, silence_s=60.0), allocate(str(library))[0]
    source, cuda = way.open(memory_of(owner), 0), ctypes.CDLL(str(library))
    errors = []

    def pull() -> None:
        try:
            source.pull(into, cut([0], [0]))
        except PeerLost as error:
            errors.append(str(error))

    cuda.double_stick(1)
    thread = threading.Thread(target=pull)
    thread.start()
    while not cuda.double_waiting():
        time.sleep(0.001)
    owner.kill()
    owner.wait()
    cuda.double_stick(0)
    thread.join(20)
    assert len(errors) == 1
    assert "is gone" in errors[0]
    way.close()


def test_copies_that_were_started_before_one_failed_are_waited_for(library, driver, owner):
    way, into = CudaIpc(driver, 0), allocate(str(library))[0]
    source = way.open(memory_of(owner), 0)
    beyond = CudaRegion(0, into.address, 1 << 30, BLOCK_BYTES)
    with pytest.raises(PeerLost, match="cuMemcpyAsync says CUDA_ERROR_INVALID_VALUE"):
        source.pull(beyond, cut([0, 1], [0, 1 << 29]))
    assert (contents_of(into)[0] == filled(0)[0]).all()
    way.close()


def test_without_cuda_the_message_says_what_to_do(library, monkeypatch):
    with pytest.raises(BackendUnavailable, match="install the driver"):
        CudaDriver("libcuda-that-is-not-there.so")
    with pytest.raises(BackendUnavailable, match="too old: it has no cuInit"):
        CudaDriver("libc.so.6")
    monkeypatch.setenv("DOUBLE_DEVICES", "0")
    with pytest.raises(BackendUnavailable, match="CUDA_ERROR_NO_DEVICE"):
        CudaDriver(str(library))


def test_memory_that_cannot_be_shared_says_why(library, driver, monkeypatch):
    region = allocate(str(library))[0]
    monkeypatch.setenv("DOUBLE_EXPANDABLE", "1")
    with pytest.raises(BackendUnavailable, match="expandable_segments"):
        describe(driver, region, os.getpid())


def _with(memory: PeerMemory, **changes: object) -> PeerMemory:
    return msgspec.structs.replace(
        memory, regions=(msgspec.structs.replace(memory.regions[0], **changes),)
    )


def _text(location: CudaLocation, **changes: object) -> str:
    return msgspec.json.encode(msgspec.structs.replace(location, **changes)).decode()


# ----------------------------------------------------------------------------------------- on GPUs

GPU_OWNER = """
import os, sys
import msgspec
import torch
from tests.transport.test_cuda_ipc import filled
from penstock.transport.cuda_driver import CudaDriver
from penstock.transport.cuda_ipc import cuda_region, describe

pool = torch.from_numpy(filled(0)).to(f"cuda:{sys.argv[1]}")
torch.cuda.synchronize()
descriptor = describe(CudaDriver(), cuda_region(pool), os.getpid())
print(msgspec.json.encode([descriptor]).decode(), flush=True)
sys.stdin.read()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("other", [0, 1])
def test_on_gpus_blocks_cross_between_two_processes(other):
    import torch

    if other >= torch.cuda.device_count():
        pytest.skip("needs a second GPU")
    with start(GPU_OWNER, str(other)) as process:
        way = CudaIpc(CudaDriver(), 0)
        source = way.open(memory_of(process), 0)
        pool = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8, device="cuda:0")
        torch.cuda.synchronize()
        order = np.random.default_rng(3).permutation(NUM_BLOCKS)
        source.pull(cuda_region(pool), cut(order, np.arange(NUM_BLOCKS)))
        assert (pool.cpu().numpy() == filled(0)[order]).all()
        process.kill()
        process.wait()
        with pytest.raises(PeerLost, match="is gone"):
            source.pull(cuda_region(pool), cut([0], [0]))
        way.close()
