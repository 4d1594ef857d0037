"""NIXL's agents in this process: the library with its settings, behind a few typed calls.

Uses the bindings below NIXL's own Python class, which lets the progress thread of an agent spin: it
burns a whole core, where one that may sleep for a millisecond takes 2 % of it and is as fast, since
what comes in wakes it. Knows addresses, lists and numbers, neither peers nor pools. Used by
`nixl.py` to read and by `nixl_owner.py` to be read.
"""

import importlib
import importlib.util
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock.core.errors import BackendUnavailable, PeerLost, PenstockError
from penstock.transfer.region import Region
from penstock.transport.cuda_ipc import CudaRegion

NIXL: Final = "nixl"
MISSING: Final = "NIXL is not installed: pip install 'penstock[nixl]'"
RDMA_DEVICES: Final = Path("/sys/class/infiniband")
OWNER_NAP_US: Final = 1000
"""How long an owner's progress thread sleeps when no event wakes it."""
SPIN_S: Final = 100e-6
NAP_S: Final = 50e-6
"""A reader asks without a pause at first, then with these: others need the core as well."""

Entries = npt.NDArray[np.int32]
"""Numbers of entries of a list."""
Rows = npt.NDArray[np.uint64]
"""Address, length, device: one row for each entry of a list."""


def is_installed() -> bool:
    """Tell whether NIXL is there, without importing it."""
    return importlib.util.find_spec(NIXL) is not None


def has_rdma(devices: Path = RDMA_DEVICES) -> bool:
    """Tell whether this host has a network that reads memory by itself."""
    return devices.is_dir() and any(devices.iterdir())


def is_worthwhile() -> bool:
    """Tell whether reads through NIXL are better than over TCP from here."""
    return is_installed() and has_rdma()


class NixlAgent:
    """One agent with UCX as its backend. Not for several threads at once.

    An owner's agent has a thread that answers where hardware does not; a reader without one is
    faster. Raises: `BackendUnavailable` when NIXL is missing or cannot start.
    """

    def __init__(self, *, is_owner: bool) -> None:
        self._library = load_bindings()
        # They have no parent of their own.
        kinds = [kind for kind in vars(self._library).values() if isinstance(kind, type)]
        self._failures = tuple(kind for kind in kinds if issubclass(kind, Exception))
        config = self._library.nixlAgentConfig()
        config.useProgThread = is_owner
        config.pthrDelay = OWNER_NAP_US
        with self._failing(BackendUnavailable, "NIXL cannot start UCX"):
            self._agent: Any = self._library.nixlAgent(secrets.token_hex(8), config)
            # Without its error handling, 4 % faster, nobody would say that a peer is gone.
            options = {"ucx_error_handling_mode": "peer"}
            self._backends = [self._agent.createBackend("UCX", options)]

    def register(self, region: Region | CudaRegion) -> None:
        """Register memory of the host or of a GPU, which must outlive the agent.

        Raises: `BackendUnavailable`.
        """
        with self._failing(BackendUnavailable, f"NIXL cannot register {region.capacity_bytes} B"):
            self._agent.registerMem(self._memory(region), self._backends)

    def unregister(self, region: Region | CudaRegion) -> None:
        """Let go of memory that no read is under way into. Raises: `BackendUnavailable`."""
        with self._failing(BackendUnavailable, "NIXL cannot let go of memory"):
            self._agent.deregisterMem(self._memory(region), self._backends)

    @property
    def metadata(self) -> bytes:
        """What another agent needs to read what is registered by now."""
        metadata: bytes = self._agent.getLocalMD()
        return metadata

    def add(self, metadata: bytes) -> str:
        """Know another agent; return its name. Raises: `PeerLost` when it is no metadata."""
        with self._failing(PeerLost, "NIXL does not understand its metadata"):
            name: bytes = self._agent.loadRemoteMD(metadata)
        return name.decode(errors="replace")

    def remove(self, name: str) -> None:
        """Hang up on another agent."""
        with suppress(*self._failures):  # it is gone already
            self._agent.invalidateRemoteMD(name)

    def prepare(self, name: str | None, rows: Rows, *, is_gpu: bool = False) -> int:
        """Return a list of descriptors of another agent's memory, or of our own; all of the host's
        memory or all of GPUs'.

        Raises: `PeerLost` when they are not inside memory that is registered.
        """
        kind = self._library.VRAM_SEG if is_gpu else self._library.DRAM_SEG
        descriptors = self._library.nixlXferDList(kind, rows)
        with self._failing(PeerLost, "NIXL finds the blocks outside what is registered"):
            prepared: int = self._agent.prepXferDlist(
                self._library.NIXL_INIT_AGENT if name is None else name, descriptors, self._backends
            )
        return prepared

    def release(self, prepared: int) -> None:
        """Let go of a list."""
        self._agent.releasedDlistH(prepared)

    def read(
        self,
        ours: tuple[int, Entries],
        theirs: tuple[int, Entries],
        watch: Callable[[], None],
    ) -> None:
        """Read entries of one list into entries of the other; `watch` ends it by raising.

        All are in flight at once, and what is adjacent on both sides is one. After an exception
        some may be so still, until the agent is closed. Raises: `PeerLost`, what `watch` raises.
        """
        library, state = self._library, None
        try:
            request = self._agent.makeXferReq(library.NIXL_READ, *ours, *theirs, "", self._backends)
            try:
                state = self._agent.postXferReq(request, "")
                spin_until = time.monotonic() + SPIN_S
                while state == library.NIXL_IN_PROG:
                    watch()
                    if time.monotonic() > spin_until:
                        time.sleep(NAP_S)
                    state = self._agent.getXferStatus(request)
            finally:
                self._agent.releaseXferReq(request)
        except self._failures as error:
            raise PeerLost(f"NIXL cannot read: {error}") from error
        if state != library.NIXL_SUCCESS:
            raise PeerLost(f"NIXL ends a read with {state}")

    def close(self) -> None:
        """End the agent, and with it every read that is under way on either side."""
        self._agent = None

    def _memory(self, region: Region | CudaRegion) -> Any:  # noqa: ANN401 - theirs, without a type
        if isinstance(region, CudaRegion):
            rows = [(region.address, region.capacity_bytes, region.device, "")]
            return self._library.nixlRegDList(self._library.VRAM_SEG, rows)
        rows = [(region.address, region.capacity_bytes, 0, "")]
        return self._library.nixlRegDList(self._library.DRAM_SEG, rows)

    @contextmanager
    def _failing(self, kind: type[PenstockError], what: str) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            raise kind(f"{what}: {error}") from error


def load_bindings() -> ModuleType:
    """Import NIXL, with settings that whoever started the process may have set otherwise.

    Raises: `BackendUnavailable` saying how to get it.
    """
    # It says what went wrong by exceptions. UCX would say it again on stdout, with a warning for
    # each of the thousands of descriptors of a read that was given up.
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    if not has_rdma():
        # There is nothing to find for it; and libraries that it loads crash at the end of the
        # process where the system has copies of its own.
        os.environ.setdefault("UCX_MODULES", "^ib")
    try:
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise BackendUnavailable(f"{MISSING} ({error})") from error
