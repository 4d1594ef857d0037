import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from penstock.core.descriptors import Endpoint, RegionDescriptor
from penstock.core.errors import DeadlineExceeded, PeerLost
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory, Region
from penstock.transport import wire
from penstock.transport.native.library import load_library
from penstock.transport.tcp import Tcp
from penstock.transport.tcp_owner import TcpOwner
from penstock.transport.wire import Status

KEY = bytes(range(32))
EPOCH = 7
BLOCK_BYTES = 4096
NUM_BLOCKS = 2048


@pytest.fixture
def pool():
    return Region(np.random.default_rng(1).integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8))


@pytest.fixture
def owner(implementation, pool):
    owner = TcpOwner(EPOCH, KEY, silence_s=2.0)
    owner.add(pool)
    yield owner
    owner.close()


@pytest.fixture
def tcp(implementation):
    tcp = Tcp(KEY, num_streams=2, silence_s=2.0)
    yield tcp
    tcp.close()


def memory_of(endpoint, epoch=EPOCH, name="p", num_blocks=NUM_BLOCKS):
    regions = (RegionDescriptor("", "", num_blocks * BLOCK_BYTES, BLOCK_BYTES),)
    return PeerMemory(name, epoch, regions, (endpoint,))


def empty(num_blocks=NUM_BLOCKS):
    return Region(np.zeros((num_blocks, BLOCK_BYTES), np.uint8))


@pytest.mark.parametrize("count", [1, 3, 300, 2048])
def test_scattered_blocks_arrive_where_they_belong(owner, tcp, pool, count, implementation):
    rng = np.random.default_rng(count)
    source_ids, destination_ids = (rng.permutation(NUM_BLOCKS)[:count] for _ in range(2))
    into, expected = empty(), empty()
    expected.blocks[destination_ids] = pool.blocks[source_ids]

    source = tcp.open(memory_of(owner.endpoint), 0)
    source.pull(into, cut(source_ids, destination_ids))

    assert (into.blocks == expected.blocks).all()
    assert source.name == {"native": "tcp", "python": "tcp (python)"}[implementation]
    wait_until(lambda: owner.server.counts[1] == count * BLOCK_BYTES)


@pytest.mark.parametrize("num_streams", [1, 2, 3])
@pytest.mark.parametrize("block_bytes", [8 << 20, (1 << 20) + 24])
def test_streams_share_the_bytes_of_big_blocks(implementation, num_streams, block_bytes):
    pool = Region(np.random.default_rng(4).integers(0, 256, (3, block_bytes), np.uint8))
    into = Region(np.zeros((3, block_bytes), np.uint8))
    with closing(TcpOwner(EPOCH, KEY)) as owner, closing(Tcp(KEY, num_streams=num_streams)) as tcp:
        owner.add(pool)
        regions = (RegionDescriptor("", "", pool.capacity_bytes, block_bytes),)
        source = tcp.open(PeerMemory("p", EPOCH, regions, (owner.endpoint,)), 0)
        source.pull(into, cut([2, 0, 1], [1, 0, 2]))
        num_reads = num_streams if implementation == "native" else 1
        wait_until(lambda: owner.server.counts[0] == num_reads)

    assert (into.blocks[[1, 0, 2]] == pool.blocks[[2, 0, 1]]).all()


def test_a_whole_pool_is_one_run_however_scattered_it_lands(owner, tcp, pool):
    into = empty()
    order = np.random.default_rng(2).permutation(NUM_BLOCKS)

    tcp.open(memory_of(owner.endpoint), 0).pull(into, cut(np.arange(NUM_BLOCKS), order))

    assert (into.blocks[order] == pool.blocks).all()


def test_more_runs_than_one_request_may_have(implementation, tcp):
    count = wire.RUNS_MAX * 2 + 17
    pool = Region(np.random.default_rng(3).integers(0, 256, (2 * count, 8), np.uint8))
    owner = TcpOwner(EPOCH, KEY)
    owner.add(pool)
    into = Region(np.zeros((count, 8), np.uint8))
    regions = (RegionDescriptor("", "", pool.capacity_bytes, 8),)
    source = tcp.open(PeerMemory("p", EPOCH, regions, (owner.endpoint,)), 0)

    source.pull(into, cut(np.arange(0, 2 * count, 2), np.arange(count)))

    assert (into.blocks == pool.blocks[::2]).all()
    owner.close()


def test_stale_epochs_are_refused_and_counted(owner, tcp):
    into = empty()
    source = tcp.open(memory_of(owner.endpoint, epoch=EPOCH - 1), 0)

    with pytest.raises(PeerLost, match="another epoch"):
        source.pull(into, np.array([[0, 0, 4]]))

    assert not into.blocks.any()
    assert owner.server.counts[2 + Status.WRONG_EPOCH] == 1


@pytest.mark.parametrize(
    "span", [(NUM_BLOCKS, 0, 1), (NUM_BLOCKS - 1, 0, 2), (2**50, 0, 1), (1, 0, NUM_BLOCKS)]
)
def test_the_owner_checks_bounds_whatever_the_reader_believes(owner, tcp, span):
    # A reader that thinks the region is larger, as an old descriptor may have it.
    source = tcp.open(memory_of(owner.endpoint, num_blocks=2 * NUM_BLOCKS), 0)
    into = empty(2 * NUM_BLOCKS)

    with pytest.raises(PeerLost, match="not inside its region"):
        source.pull(into, np.array([span], np.int64))

    assert owner.server.counts[2 + Status.OUT_OF_BOUNDS] >= 1
    assert owner.server.counts[1] <= NUM_BLOCKS * BLOCK_BYTES
    # What was refused has not broken what is open.
    source.pull(into, np.array([(5, 0, 1)]))


def test_a_region_that_is_not_there_is_refused(owner, tcp):
    memory = memory_of(owner.endpoint)
    source = tcp.open(PeerMemory("p", EPOCH, memory.regions * 2, memory.endpoints), 1)

    with pytest.raises(PeerLost, match="no such region"):
        source.pull(empty(), np.array([(0, 0, 1)]))


def test_a_wrong_key_opens_nothing(owner, caplog):
    stranger = Tcp(bytes(32), silence_s=2.0)

    with pytest.raises(PeerLost, match="cluster key"):
        stranger.open(memory_of(owner.endpoint), 0)

    wait_until(lambda: owner.num_strangers == 1)
    assert "does not know our cluster key" in caplog.text


def test_an_owner_with_another_key_is_not_believed(implementation):
    """An impostor that lets everybody in cannot prove that it knows the key."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def impose():
            stream, _ = listener.accept()
            with stream:
                stream.recv(40, socket.MSG_WAITALL)
                stream.sendall(bytes(32))
                stream.recv(32, socket.MSG_WAITALL)
                stream.sendall(bytes(32))

        thread = threading.Thread(target=impose)
        thread.start()
        endpoint = Endpoint("tcp", f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(PeerLost, match="does not know our cluster key"):
            Tcp(KEY, silence_s=2.0).open(memory_of(endpoint), 0)
        thread.join()


def test_an_owner_that_says_nothing_is_given_up_in_time(implementation):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint("tcp", f"127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(PeerLost, match="too long"):
            Tcp(KEY, silence_s=0.3).open(memory_of(endpoint), 0)
        assert time.monotonic() - started < 2


def test_an_owner_that_falls_silent_in_a_pull_is_given_up_in_time(implementation):
    """It authenticates, answers the header, and then sends half of the blocks."""
    from penstock.transport.handshake import admit

    with socket.create_server(("127.0.0.1", 0)) as listener:
        is_over = threading.Event()

        def dawdle():
            stream, _ = listener.accept()
            with stream:
                admit(stream, KEY, 5.0)
                stream.recv(wire.REQUEST.size + wire.RUN.size, socket.MSG_WAITALL)
                stream.sendall(wire.REPLY.pack(wire.MAGIC, 0, 0, 4 * BLOCK_BYTES))
                stream.sendall(bytes(2 * BLOCK_BYTES))
                is_over.wait(10)

        thread = threading.Thread(target=dawdle)
        thread.start()
        endpoint = Endpoint("tcp", f"127.0.0.1:{listener.getsockname()[1]}")
        source = Tcp(KEY, num_streams=1, silence_s=0.4).open(memory_of(endpoint), 0)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="silent"):
            source.pull(empty(), np.array([(0, 0, 4)]))
        assert time.monotonic() - started < 3
        is_over.set()
        thread.join()


def test_a_cut_connection_is_opened_anew(owner, tcp, pool):
    source = tcp.open(memory_of(owner.endpoint), 0)
    into = empty()
    source.pull(into, np.array([(0, 0, 1)]))
    for stream in tcp.connection(memory_of(owner.endpoint))._streams:
        stream.shutdown(socket.SHUT_RDWR)

    source.pull(into, np.array([(9, 1, 1)]))

    assert (into.blocks[1] == pool.blocks[9]).all()


def test_who_is_forgotten_is_not_called_again(owner, tcp):
    source = tcp.open(memory_of(owner.endpoint), 0)

    tcp.forget("p", EPOCH)

    with pytest.raises(PeerLost, match="forgotten"):
        source.pull(empty(), np.array([(0, 0, 1)]))


def test_a_closed_owner_lets_go_of_everything(owner, tcp):
    source = tcp.open(memory_of(owner.endpoint), 0)

    owner.close()
    owner.close()

    with pytest.raises(PeerLost, match=r"called|lost|hung up"):
        source.pull(empty(), np.array([(0, 0, 1)]))


def test_several_peers_read_at_once(owner, pool):
    def read(index):
        reader = Tcp(KEY, silence_s=5.0)
        order = np.random.default_rng(index).permutation(NUM_BLOCKS)
        into = empty()
        source = reader.open(memory_of(owner.endpoint), 0)
        for _ in range(3):
            source.pull(into, cut(order, np.arange(NUM_BLOCKS)))
        correct[index] = (into.blocks == pool.blocks[order]).all()
        reader.close()

    correct = [False] * 4
    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert all(correct)


def test_handshakes_that_never_end_do_not_keep_others_out(owner, tcp):
    host, port = owner.endpoint.address.split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(8)]

    tcp.open(memory_of(owner.endpoint), 0).pull(empty(), np.array([(0, 0, 1)]))

    for stream in idle:
        stream.close()


OWNER = """
import sys, threading
import numpy as np
from penstock.transfer.region import Region
from penstock.transport.tcp_owner import TcpOwner

owner = TcpOwner(7, bytes(range(32)))
owner.add(Region(np.full((int(sys.argv[1]), 4096), 9, np.uint8)))
print(owner.endpoint.address, flush=True)
if sys.argv[2] == "busy":
    n = 0
    while True:  # holds the interpreter lock
        n += 1
sys.stdin.read()
"""


def start_owner(mode, num_blocks=NUM_BLOCKS):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(num_blocks), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, Endpoint("tcp", process.stdout.readline().strip())


def test_an_owner_that_is_killed_in_a_pull_is_an_error_and_no_hang(no_leaks, tcp):
    process, endpoint = start_owner("idle", 1 << 16)
    with process:
        memory = memory_of(endpoint, num_blocks=1 << 16)
        source = tcp.open(memory, 0)
        into = empty(1 << 16)
        spans = cut(np.arange(1 << 16), np.random.default_rng(0).permutation(1 << 16))
        timer = threading.Timer(0.02, lambda: os.kill(process.pid, signal.SIGKILL))
        timer.start()
        started = time.monotonic()
        with pytest.raises((PeerLost, DeadlineExceeded)):
            pull_forever(source, into, spans)
        assert time.monotonic() - started < 20
        timer.join()


def pull_forever(source, into, spans):
    while True:
        source.pull(into, spans)


def test_an_owner_that_computes_serves_all_the_same(no_leaks):
    """Its Python thread never lets go of the lock for longer than it must; reads do not need it."""
    if load_library() is None:
        pytest.skip("there is no compiler")
    process, endpoint = start_owner("busy")
    with process:
        tcp = Tcp(KEY)
        source = tcp.open(memory_of(endpoint), 0)
        into = empty()
        seconds = []
        for i in range(50):
            started = time.perf_counter()
            source.pull(into, np.array([(i, i, 1)]))
            seconds.append(time.perf_counter() - started)
        assert (into.blocks[:50] == 9).all()
        # Behind the interpreter lock a read would wait for a switch interval of 5 ms, twice.
        assert sorted(seconds)[10] < 0.005
        tcp.close()
        process.kill()


def wait_until(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
