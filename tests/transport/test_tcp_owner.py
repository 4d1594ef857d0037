"""What strangers and peers may send that no reader of ours does: nothing leaves that must not."""

import socket
from contextlib import suppress

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.transfer.region import Region
from penstock.transport import wire
from penstock.transport.tcp import call
from penstock.transport.tcp_owner import TcpOwner

KEY = bytes(range(32))
EPOCH = 7


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
numbers = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1))


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
    asked = [run for run in runs if run[0] + run[1] <= 16]
    assert (
        body
        == b"".join(bytes([first + i] * 32) for first, n in asked for i in range(n))[: len(body)]
    )


def _fuzzed_owner():
    """Return one owner for all examples: 16 blocks of 32 bytes, each full of its number."""
    if not _FUZZED:
        _FUZZED.append(TcpOwner(EPOCH, KEY, silence_s=0.5))
        blocks = np.repeat(np.arange(16, dtype=np.uint8), 32).reshape(16, 32)
        _FUZZED[0].add(Region(blocks))
    return _FUZZED[0]


_FUZZED = []
