"""What strangers and peers may send that no reader of ours does: nothing leaves that must not."""

import socket
from contextlib import closing, suppress

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.transfer.region import Region
from penstock.transport import wire
from penstock.transport.tcp import call
from penstock.transport.tcp_owner import TcpOwner

KEY = bytes(range(32))
EPOCH = 7
REGION_BYTES = 512
CONTENTS = np.random.default_rng(5).integers(0, 256, REGION_BYTES, np.uint8).tobytes()


@settings(max_examples=40)
@given(junk=st.binary(max_size=200), is_greeting=st.booleans())
def test_junk_before_the_handshake_gets_a_nonce_at_most(junk, is_greeting):
    owner = _fuzzed_owner()
    host, port = owner.endpoint.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as stream:
        answer = say(stream, b"PNSTOCK\x01" * is_greeting + junk)
    is_greeted = is_greeting or junk.startswith(b"PNSTOCK\x01")
    assert len(answer) in ((0, 32) if is_greeted else (0,))
    assert owner.server.counts[:3] == [0, 0, 0]


def say(stream, data):
    """Say it all, and return what is answered until the other side hangs up."""
    answer = b""
    with suppress(ConnectionError):
        stream.sendall(data)
        with suppress(OSError):  # hung up already
            stream.shutdown(socket.SHUT_WR)
        while chunk := stream.recv(1 << 16):
            answer += chunk
    return answer


headers = st.tuples(
    st.sampled_from([wire.MAGIC, 0, 2**32 - 1]),
    st.integers(0, 4),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([EPOCH, EPOCH, EPOCH, 0, 2**64 - 1]),
    st.sampled_from([0, 0, 0, 1, 2**32 - 1]),
    st.sampled_from([0, 1, 2, wire.RUNS_MAX, wire.RUNS_MAX + 1, 2**32 - 1]),
    st.integers(0, 2**64 - 1),
)
numbers = st.one_of(
    st.integers(0, 40), st.integers(REGION_BYTES - 20, REGION_BYTES + 20), st.integers(0, 2**64 - 1)
)


@settings(max_examples=60)
@given(header=headers, runs=st.lists(st.tuples(numbers, numbers), max_size=3), junk=st.binary())
def test_what_an_authenticated_peer_makes_up_reads_nothing_outside(header, runs, junk):
    owner = _fuzzed_owner()
    stream = call(owner.endpoint.address, KEY, 10.0)
    with stream:
        stream.settimeout(10)
        words = [wire.REQUEST.pack(*header), *(wire.RUN.pack(*run) for run in runs), junk]
        answer = say(stream, b"".join(words))
    if len(answer) < wire.REPLY.size:
        return
    magic, status, _, num_bytes = wire.REPLY.unpack(answer[: wire.REPLY.size])
    assert magic == wire.MAGIC
    if status or not num_bytes:
        return
    body = answer[wire.REPLY.size :][:num_bytes]
    asked = [run for run in runs if run[0] + run[1] <= REGION_BYTES]
    assert body == b"".join(CONTENTS[first : first + n] for first, n in asked)[: len(body)]


def test_runs_of_bytes_come_exactly_or_not_at_all(implementation):
    """Both ends of every run are looked at, whatever their sum would be in 64 bits."""
    answered = set()

    @settings(max_examples=60, deadline=None)
    @given(runs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3))
    def asks(runs):
        header = wire.REQUEST.pack(wire.MAGIC, wire.READ, 0, EPOCH, 0, len(runs), 9)
        with call(owner.endpoint.address, KEY, 10.0) as stream:
            stream.settimeout(10)
            answer = say(stream, header + b"".join(wire.RUN.pack(*run) for run in runs))
        is_inside = all(size and first + size <= REGION_BYTES for first, size in runs)
        expected = b"".join(CONTENTS[first : first + size] for first, size in runs)
        status = wire.Status.OK if is_inside else wire.Status.OUT_OF_BOUNDS
        body = expected if is_inside else b""
        assert answer == wire.REPLY.pack(wire.MAGIC, status, 9, len(body)) + body
        answered.add(status)

    with closing(_new_owner()) as owner:
        asks()
    assert answered == {wire.Status.OK, wire.Status.OUT_OF_BOUNDS}


def _fuzzed_owner():
    """Return one owner for all examples."""
    if not _FUZZED:
        _FUZZED.append(_new_owner())
    return _FUZZED[0]


def _new_owner():
    owner = TcpOwner(EPOCH, KEY, silence_s=0.5)
    owner.add(Region(np.frombuffer(CONTENTS, np.uint8).reshape(16, 32)))
    return owner


_FUZZED = []
