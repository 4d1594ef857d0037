"""What an owner that knows the key may answer and none of ours does: the reader is told, nothing
lands outside the blocks that it named, and it does not wait for ever.
"""

import socket
import threading
from contextlib import closing, suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.descriptors import Endpoint, RegionDescriptor
from penstock.core.errors import DeadlineExceeded, PeerLost
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory, Region
from penstock.transport import wire
from penstock.transport.handshake import admit
from penstock.transport.tcp import Tcp

KEY = bytes(range(32))
BLOCK_BYTES, NUM_BLOCKS = 64, 4
WANTED = [1, 3]
RIGHT = len(WANTED) * BLOCK_BYTES
CANARY = 0xA5


class Liar:
    """Admits who calls, hears one request, and answers with `words`."""

    def __init__(self, words: bytes) -> None:
        self._words = words
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.endpoint = Endpoint("tcp", f"{host}:{port}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError), self._listener:
            stream, _ = self._listener.accept()
            with stream:
                admit(stream, KEY, 10.0)
                stream.settimeout(10)
                stream.recv(1 << 16)
                stream.sendall(self._words)

    def close(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def replies(magic, status, request_id, num_bytes):
    return st.tuples(
        st.sampled_from([wire.MAGIC, wire.MAGIC, magic]),
        st.sampled_from([0, 0, 0, status]),
        st.sampled_from([0, 0, 0, request_id]),
        st.sampled_from([RIGHT, RIGHT, num_bytes]),
    )


made_up = st.one_of(
    replies(0, 1, 1, 0),
    replies(1, 5, 2**64 - 1, RIGHT - 1),
    replies(2**32 - 1, 2**32 - 1, 7, 2**64 - 1),
)


@pytest.mark.parametrize("seed", [1])
def test_whatever_is_answered_nothing_lands_elsewhere(implementation, seed):
    answered = []

    @settings(max_examples=60, deadline=None)
    @given(header=made_up, length=st.sampled_from([0, 1, RIGHT - 1, RIGHT, RIGHT, RIGHT + 9]))
    def hears(header, length):
        body = np.random.default_rng(seed).integers(0, 256, length, np.uint8).tobytes()
        memory = np.full((NUM_BLOCKS + 2, BLOCK_BYTES), CANARY, np.uint8)
        into = Region(memory[1:-1])
        with closing(Liar(wire.REPLY.pack(*header) + body)) as liar:
            regions = (RegionDescriptor("", "", NUM_BLOCKS * BLOCK_BYTES, BLOCK_BYTES),)
            peer = PeerMemory("p", 7, regions, (liar.endpoint,))
            with closing(Tcp(KEY, num_streams=1, silence_s=2.0)) as tcp:
                is_right = header == (wire.MAGIC, 0, 0, RIGHT) and length >= RIGHT
                try:
                    tcp.open(peer, 0).pull(into, cut([0, 2], WANTED))
                    answered.append(True)
                    assert is_right, header
                    assert into.blocks[WANTED].tobytes() == body[:RIGHT]
                except (PeerLost, DeadlineExceeded):
                    answered.append(False)
                    assert not is_right, header
        outside = [0, *(1 + i for i in range(NUM_BLOCKS) if i not in WANTED), NUM_BLOCKS + 1]
        assert (memory[outside] == CANARY).all()

    hears()
    assert set(answered) == {True, False}
