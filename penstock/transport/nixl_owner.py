"""The owner's side of NIXL: registers regions and is not asked again.

Its address carries what NIXL tells of an agent, the keys of the memory among it, so unlike other
descriptors it is a secret. Regions are read without a word to this program, so it can refuse
nobody: a page that every reader reads along says which incarnation this is.
"""

import base64
import binascii
import secrets
from struct import Struct
from typing import Annotated, Final

import msgspec
import numpy as np

from penstock.core.descriptors import Endpoint
from penstock.core.errors import PeerLost
from penstock.transfer.region import PeerMemory, Region
from penstock.transport.cuda_ipc import CudaRegion
from penstock.transport.nixl_agent import NIXL, NixlAgent

TOKEN_BYTES: Final = 32
HOST: Final = -1
PAGE: Final = Struct(f"<Q{TOKEN_BYTES}s24x")
"""An owner's epoch and a random token."""
_Place = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class NixlAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where an owner is read: NIXL's metadata, its page, and where each region begins."""

    metadata: bytes
    page: _Place
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    bases: tuple[_Place, ...]
    devices: tuple[int, ...] = ()
    """Of regions on GPUs the device there, of others -1; without an entry all are the host's."""

    def device(self, index: int) -> int | None:
        """Return the device that a region is on, or None where it is the host's."""
        device = self.devices[index] if index < len(self.devices) else HOST
        return device if device >= 0 else None


class NixlOwner:
    """Lets peers that know its endpoint read regions, from construction to `close`.

    Raises: `BackendUnavailable` when NIXL is missing or cannot start.
    """

    def __init__(self, epoch: int) -> None:
        self._agent = NixlAgent(is_owner=True)
        self._token = secrets.token_bytes(TOKEN_BYTES)
        page = np.frombuffer(bytearray(PAGE.pack(epoch, self._token)), np.uint8)
        self._page = Region(page.reshape(1, -1))
        self._agent.register(self._page)
        self._regions: list[Region | CudaRegion] = []

    @property
    def endpoint(self) -> Endpoint:
        """How what is registered by now is read. Who knows it can: it is for peers alone."""
        bases = tuple(region.address for region in self._regions)
        devices = tuple(
            region.device if isinstance(region, CudaRegion) else HOST for region in self._regions
        )
        address = NixlAddress(self._agent.metadata, self._page.address, self._token, bases, devices)
        return Endpoint(NIXL, base64.b64encode(msgspec.msgpack.encode(address)).decode())

    def add(self, region: Region | CudaRegion) -> int:
        """Let a region be read, of the host's memory or a GPU's; return its index.

        Its memory stays until `close`. Raises: `BackendUnavailable` when it cannot be registered.
        """
        self._agent.register(region)
        self._regions.append(region)
        return len(self._regions) - 1

    def close(self) -> None:
        """Leave; then no region is read any more."""
        self._agent.close()
        self._regions.clear()


def address_of_owner(peer: PeerMemory) -> NixlAddress:
    """Return where a peer says it is read. Raises: `PeerLost` when it does not, or makes no sense.

    Nothing in it is trusted: what is to be read is compared with the metadata, by NIXL, and what
    comes with the page.
    """
    texts = [endpoint.address for endpoint in peer.endpoints if endpoint.kind == NIXL]
    if not texts:
        raise PeerLost("it serves no reads through NIXL")
    try:
        return msgspec.msgpack.decode(base64.b64decode(texts[0], validate=True), type=NixlAddress)
    except (msgspec.DecodeError, UnicodeError, binascii.Error, ValueError) as error:
        raise PeerLost(f"its NIXL address makes no sense: {error}") from error
