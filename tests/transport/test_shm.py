import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.descriptors import RegionDescriptor
from penstock.core.errors import PeerLost, StartupFailed
from penstock.core.events import Span
from penstock.transfer.plan import cut, span_array
from penstock.transfer.region import PeerMemory, Region
from penstock.transport.native.library import load_library
from penstock.transport.shm import (
    FILE,
    HOST_KIND,
    MEMFD,
    SMALL_BYTES,
    SharedMemory,
    SharedPool,
    copy_spans,
    open_peer,
)

KINDS = [
    pytest.param(MEMFD, marks=pytest.mark.skipif(HOST_KIND != MEMFD, reason="needs memfd")),
    FILE,
]
needs_memfd = pytest.mark.skipif(HOST_KIND != MEMFD, reason="needs memfd")

OWNER = """
import json, sys
import msgspec
from penstock.transport.shm import SharedPool

pool = SharedPool(16, 4096)
for line in sys.stdin:
    pool.region.blocks[:] = int(line)
    print(json.dumps(msgspec.to_builtins(pool.descriptor)), flush=True)
"""


@pytest.fixture(params=KINDS)
def pool(request):
    pool = SharedPool(8, 96, kind=request.param)
    yield pool
    pool.close()


def test_a_peer_sees_what_the_owner_writes(pool):
    region = open_peer(pool.descriptor)
    assert not region.blocks.any()

    pool.region.blocks[3] = 7

    assert (region.num_blocks, region.block_bytes) == (8, 96)
    assert (region.blocks[3] == 7).all()
    assert region.blocks.sum() == 7 * 96


def test_a_peer_cannot_write(pool):
    region = open_peer(pool.descriptor)

    with pytest.raises(ValueError, match="read-only"):
        region.blocks[0] = 1


def test_a_descriptor_survives_the_wire(pool):
    encoded = msgspec.msgpack.encode(pool.descriptor)

    descriptor = msgspec.msgpack.decode(encoded, type=RegionDescriptor)

    assert open_peer(descriptor).num_blocks == 8


def test_a_closed_pool_lets_nobody_in_and_takes_nothing_away(pool):
    descriptor = pool.descriptor
    region = open_peer(descriptor)
    pool.region.blocks[0] = 5

    pool.close()
    pool.close()

    assert (region.blocks[0] == 5).all()
    with pytest.raises(PeerLost):
        open_peer(descriptor)


def test_a_descriptor_that_lies_about_the_size_is_refused(pool):
    kind, location, capacity_bytes, block_bytes = msgspec.structs.astuple(pool.descriptor)
    for lie in (
        RegionDescriptor(kind, location, 2 * capacity_bytes, block_bytes),
        RegionDescriptor(kind, location, capacity_bytes, 7),
        RegionDescriptor(kind, location, capacity_bytes, 0),
        RegionDescriptor(kind, location, capacity_bytes, -96),
    ):
        with pytest.raises(PeerLost, match="does not describe"):
            open_peer(lie)


@pytest.mark.parametrize("kind", KINDS)
def test_more_memory_than_there_can_be_is_an_error_at_the_start(kind):
    descriptors = os.listdir("/proc/self/fd") if HOST_KIND == MEMFD else []

    with pytest.raises(StartupFailed):
        SharedPool(2**40, 2**22, kind=kind)

    if HOST_KIND == MEMFD:
        assert len(os.listdir("/proc/self/fd")) == len(descriptors)


@needs_memfd
def test_a_reused_descriptor_number_is_not_mistaken_for_the_pool():
    old = SharedPool(4, 64)
    descriptor = old.descriptor
    old.close()
    new = SharedPool(4, 64)
    assert new.descriptor.location.rsplit(":", 1)[0] == descriptor.location.rsplit(":", 1)[0]

    with pytest.raises(PeerLost, match="in its place"):
        open_peer(descriptor)
    new.close()


@needs_memfd
def test_a_pipe_in_the_place_of_the_pool_does_not_make_the_peer_wait():
    reader, writer = os.pipe()
    location = f"{os.getpid()}:{reader}:{'0' * 32}"

    with pytest.raises(PeerLost, match="in its place"):
        open_peer(RegionDescriptor(MEMFD, location, 64, 64))
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("location", ["", "1:2", "a:b:c", "1:2:3:4", "../../1:0:x"])
@needs_memfd
def test_a_location_that_is_none_is_refused(location):
    with pytest.raises(PeerLost, match="cannot be opened"):
        open_peer(RegionDescriptor(MEMFD, location, 64, 64))


def test_a_file_elsewhere_is_refused(tmp_path):
    path = tmp_path / "penstock-kv-x"
    path.write_bytes(bytes(64))

    with pytest.raises(PeerLost, match="cannot be opened"):
        open_peer(RegionDescriptor(FILE, str(path), 64, 64))


def test_a_pool_in_a_file_says_so_and_is_removed(caplog):
    pool = SharedPool(2, 64, kind=FILE)
    path = Path(pool.descriptor.location)
    assert path.exists()
    assert str(path) in caplog.text

    pool.close()

    assert not path.exists()


@needs_memfd
def test_the_size_cannot_be_changed_under_a_peer():
    pool = SharedPool(2, 64)
    fd = int(pool.descriptor.location.split(":")[1])

    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    pool.close()


@needs_memfd
def test_pages_are_taken_when_they_are_asked_for_or_touched():
    pool = SharedPool(64, 65536)
    fd = int(pool.descriptor.location.split(":")[1])
    assert os.fstat(fd).st_blocks == 0
    pool.region.blocks[0] = 9

    pool.populate(0, 16)

    # Huge pages, where the kernel gives them, round up.
    assert 16 * 65536 <= 512 * os.fstat(fd).st_blocks <= max(16 * 65536, 2 << 20)
    assert (pool.region.blocks[0] == 9).all()
    pool.close()


@needs_memfd
def test_no_trace_is_left_by_an_owner_that_is_killed(no_leaks):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        descriptor, token = tell(owner, 11)
        region = open_peer(descriptor)
        assert (region.blocks == 11).all()
        tell(owner, 22)
        assert (region.blocks == 22).all()

        owner.send_signal(signal.SIGKILL)

    assert (region.blocks == 22).all()  # what is mapped stays
    with pytest.raises(PeerLost):
        open_peer(descriptor)
    assert token in Path("/proc/self/maps").read_text()
    del region
    assert token not in Path("/proc/self/maps").read_text()


def tell(owner, value):
    """Have the owner fill its pool; return its descriptor and the pool's token."""
    owner.stdin.write(f"{value}\n")
    owner.stdin.flush()
    descriptor = RegionDescriptor(*json.loads(owner.stdout.readline()))
    return descriptor, descriptor.location.split(":")[2]


spans = st.builds(Span, st.integers(0, 10), st.integers(0, 10), st.integers(1, 5))


@given(st.lists(spans, max_size=8))
def test_spans_are_copied_and_nothing_else(spans):
    source = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24)
    destination = np.zeros((16, 24), np.uint8)
    expected = destination.copy()
    for span in spans:
        for i in range(span.num_blocks):
            expected[span.destination + i] = source[span.source + i]

    copy_spans(Region(source), Region(destination), span_array(spans))

    assert (destination == expected).all()


@pytest.mark.parametrize(
    ("num_bytes", "block_bytes"),
    [
        *((6_000_000, block_bytes) for block_bytes in (1, 63, 64, 300, 4096, 65537)),
        # So much that two threads share it, down to a single block.
        *((20_000_000, block_bytes) for block_bytes in (300, 4096, 65537, 9_999_999, 20_000_000)),
    ],
)
def test_a_big_move_goes_around_the_cache_and_copies_the_same(num_bytes, block_bytes):
    rng = np.random.default_rng(block_bytes)
    count = num_bytes // block_bytes
    source = rng.integers(0, 256, (count + 3, block_bytes), np.uint8)
    # An odd start: streamed stores want whole lines, and spans begin anywhere.
    destination = np.zeros((count + 5) * block_bytes + 1, np.uint8)[1:].reshape(-1, block_bytes)
    expected = destination.copy()
    source_ids, destination_ids = rng.permutation(count + 3)[:count], rng.permutation(count)
    expected[destination_ids] = source[source_ids]

    copy_spans(Region(source), Region(destination), cut(source_ids, destination_ids))

    assert (destination == expected).all()


@pytest.mark.parametrize("num_bytes", [1, 4096, SMALL_BYTES, SMALL_BYTES + 1])
def test_a_single_block_is_copied_and_nothing_else(num_bytes):
    source = np.random.default_rng(num_bytes).integers(1, 256, (3, num_bytes), np.uint8)
    destination = np.zeros((3, num_bytes), np.uint8)

    copy_spans(Region(source), Region(destination), np.array([(2, 1, 1)], np.int64))

    assert (destination[1] == source[2]).all()
    assert not destination[[0, 2]].any()


def test_without_a_compiler_numpy_copies_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_library.cache_clear()
    try:
        pool = SharedPool(8, 64)
        pool.region.blocks[3] = 7
        peer = PeerMemory("p", 1, (pool.descriptor,))
        first, second = (SharedMemory().open(peer, 0) for _ in range(2))
        into = Region(np.zeros((4, 64), np.uint8))

        first.pull(into, span_array([Span(2, 0, 2)]))

        assert (into.blocks[1] == 7).all()
        assert into.blocks.sum() == 7 * 64
        assert first.name == second.name == "shm (numpy)"
        assert caplog.text.count("moved by Python") == 1
        pool.close()
    finally:
        load_library.cache_clear()
