"""NIXL and Mooncake in `transfer.py`, at their default and at the best settings known for them.

Runs in an environment of theirs, as `transfer_peers.py KIND target` and `... KIND initiator`, with
one process each. The target prints what the initiator needs and then does as its library wishes;
the initiator takes commands on stdin: an index of a shape, or `single INDEX COUNT`. Only the
transfer is timed; preparing the lists of descriptors is not, in favour of the peers.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import numpy.typing as npt
from transfer_shapes import SHAPES, empty_pool

KINDS = ("nixl_default", "nixl", "nixl_tcp_default", "nixl_tcp", "mooncake")
WAIT_S = 60.0
BATCH = 1024
"""Mooncake refuses much longer ones."""


def addresses(pool: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return (address, length, device) of each block, as NIXL wants them."""
    rows = np.zeros((len(pool), 3), np.uint64)
    rows[:, 0] = pool.ctypes.data + np.arange(len(pool), dtype=np.uint64) * pool.shape[1]
    rows[:, 1] = pool.shape[1]
    return rows


class Nixl:
    """NIXL over UCX. Best: no progress thread at the initiator, no error handling by UCX."""

    def __init__(self, kind: str, role: str, pools: list[npt.NDArray[np.uint8]]) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        is_best = not kind.endswith("default")
        progress = role == "target" or not is_best
        handling = is_best and "tcp" not in kind
        config = nixl_agent_config(
            enable_prog_thread=progress, backends=[] if handling else ["UCX"]
        )
        self.agent = nixl_agent(role, config)
        if handling:
            self.agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
        self.pools = pools
        for pool in pools:
            self.agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")

    def facts(self) -> dict[str, Any]:
        """Return what the initiator needs."""
        return {"metadata": self.agent.get_agent_metadata().hex()}

    def connect(self, facts: dict[str, Any]) -> None:
        """Prepare every list once."""
        peer = self.agent.add_remote_agent(bytes.fromhex(facts["metadata"]))
        self.lists = []
        for pool, base in zip(self.pools, facts["bases"], strict=True):
            theirs = addresses(pool)
            theirs[:, 0] += np.uint64(base) - theirs[0, 0]
            self.lists.append(
                (
                    self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", addresses(pool), "DRAM"),
                    self.agent.prep_xfer_dlist(peer, theirs, "DRAM"),
                )
            )

    def read(self, index: int, source: list[int], destination: list[int]) -> float:
        """Move blocks; return the seconds."""
        ours, theirs = self.lists[index]
        handle = self.agent.make_prepped_xfer(
            "READ", ours, np.array(destination, np.int32), theirs, np.array(source, np.int32)
        )
        started = time.perf_counter()
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
            assert time.perf_counter() < started + WAIT_S
        seconds = time.perf_counter() - started
        assert state == "DONE", state
        self.agent.release_xfer_handle(handle)
        return seconds


class Mooncake:
    """Mooncake's transfer engine over TCP."""

    def __init__(self, _kind: str, _role: str, pools: list[npt.NDArray[np.uint8]]) -> None:
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        assert self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        self.pools = pools
        for pool in pools:
            assert self.engine.register_memory(pool.ctypes.data, pool.nbytes) == 0

    def facts(self) -> dict[str, Any]:
        """Return what the initiator needs."""
        return {"port": self.engine.get_rpc_port()}

    def connect(self, facts: dict[str, Any]) -> None:
        """Remember where the target is."""
        self.peer = f"127.0.0.1:{facts['port']}"
        self.bases = facts["bases"]

    def read(self, index: int, source: list[int], destination: list[int]) -> float:
        """Move blocks; return the seconds."""
        size = self.pools[index].shape[1]
        ours = [self.pools[index].ctypes.data + i * size for i in destination]
        theirs = [self.bases[index] + i * size for i in source]
        started = time.perf_counter()
        for i in range(0, len(ours), BATCH):
            part = slice(i, i + BATCH)
            sizes = [size] * len(ours[part])
            wrong = self.engine.batch_transfer_sync_read(self.peer, ours[part], theirs[part], sizes)
            assert wrong == 0, wrong
        return time.perf_counter() - started


def main() -> None:
    """Be one side of one peer."""
    kind, role = sys.argv[1:3]
    if "nixl_tcp" in kind:
        os.environ["UCX_TLS"] = "tcp,self"
    pools = [empty_pool(shape) for shape in SHAPES]
    side = (Mooncake if kind == "mooncake" else Nixl)(kind, role, pools)
    if role == "target":
        for shape, pool in zip(SHAPES, pools, strict=True):
            shape.fill(pool)
        bases = [pool.ctypes.data for pool in pools]
        print("facts " + json.dumps({**side.facts(), "bases": bases}), flush=True)
        sys.stdin.read()
        os._exit(0)  # these libraries do not always end by themselves
    side.connect(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        words = line.split()
        if words[0] == "single":
            index, count = int(words[1]), int(words[2])
            answer = [side.read(index, [i], [i]) for i in range(count)]
        elif words[0] == "check":
            answer = [float(SHAPES[int(words[1])].is_right(pools[int(words[1])]))]
        else:
            blocks = SHAPES[int(words[0])].blocks
            answer = [side.read(int(words[0]), blocks[0].tolist(), blocks[1].tolist())]
        print("answer " + json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
