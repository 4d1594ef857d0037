"""The few calls of the CUDA driver that moves of blocks need, behind one protocol: `cuda_ipc.py`
between processes, `device_tiers.py` between a device and the host.

Straight to `libcuda` and not by way of torch, whose own sharing of tensors is made of pickles.
Every call releases the interpreter lock, and leaves the context of the calling thread as it was.
Contexts are the primary ones, which torch uses as well. Signatures are those of cuda.h, where a
macro gives many of the functions a version. Not for a process that was forked after a first use of
CUDA: the driver does not survive it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    CDLL,
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int,
    c_size_t,
    c_ubyte,
    c_uint,
    c_uint64,
    c_void_p,
    create_string_buffer,
)
from typing import Final, NamedTuple, Protocol

from penstock.core.errors import BackendUnavailable, PeerLost, PenstockError

LIBRARY: Final = "libcuda.so.1"
HANDLE_BYTES: Final = 64
UUID_BYTES: Final = 16
NOT_READY: Final = 600
LAZY_ENABLE_PEER_ACCESS: Final = 1
STREAM_NON_BLOCKING: Final = 1
EVENT_DISABLE_TIMING: Final = 2
HOST_PORTABLE: Final = 1


class IpcHandle(Structure):
    """`CUipcMemHandle`: names an allocation of another process, and is passed by value."""

    _fields_ = [("reserved", c_ubyte * HANDLE_BYTES)]


class Uuid(Structure):
    """`CUuuid`."""

    _fields_ = [("bytes", c_ubyte * UUID_BYTES)]


class Exported(NamedTuple):
    """How another process maps memory: the allocation, and where in it an address lies."""

    handle: bytes
    offset: int


class Mapped(NamedTuple):
    """An allocation of another process, here."""

    address: int
    num_bytes: int


class Copy(NamedTuple):
    """Bytes from one address to another, of a device or of pinned memory of the host."""

    destination: int
    source: int
    num_bytes: int


class Driver(Protocol):
    """What moves ask of CUDA. Devices are ordinals. One lot of copies at a time on a device: who
    wants another beside it makes another driver, which has a stream of its own.
    """

    def uuid(self, device: int) -> bytes:
        """Return the 16 bytes that name a device. Raises: `BackendUnavailable`."""

    def find(self, uuid: bytes) -> int | None:
        """Return the device of that name, or None when this process does not see it."""

    def can_reach(self, device: int, other: int) -> bool:
        """Tell whether a device reads memory of another one."""

    def export(self, device: int, address: int) -> Exported:
        """Return how others map the allocation around an address. Raises: `BackendUnavailable`."""

    def map(self, device: int, handle: bytes) -> Mapped:
        """Map an allocation of another process for a device. Raises: `PeerLost`."""

    def unmap(self, device: int, address: int) -> None:
        """Undo one `map`."""

    def pin(self, device: int, address: int, num_bytes: int) -> None:
        """Keep pages of the host where they are, so that a device copies them itself.

        Raises: `BackendUnavailable`.
        """

    def unpin(self, device: int, address: int) -> None:
        """Undo one `pin`, before the memory is given back."""

    def copy(self, device: int, copies: Sequence[Copy]) -> None:
        """Start copies on a stream that waits for nobody else's. Raises: `PeerLost`."""

    def is_done(self, device: int) -> bool:
        """Tell whether all copies that were started have ended. Raises: `PeerLost`."""


_FUNCTIONS: Final = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetUuid_v2": (POINTER(Uuid), c_int),
    "cuDeviceCanAccessPeer": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuMemcpyAsync": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
}


class _Device:
    """A device in use: its primary context, our stream in it, and the event behind the copies."""

    def __init__(self, number: int, context: c_void_p) -> None:
        self.number = number
        self.context = context
        self.stream = c_void_p()
        self.event = c_void_p()


class CudaDriver:
    """`Driver` by ctypes. What it holds, a stream and an event a device, ends with the process.

    Raises: `BackendUnavailable` saying what to do when there is no CUDA here.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = CDLL(library)
        except OSError as error:
            raise BackendUnavailable(
                f"CUDA IPC needs the NVIDIA driver, and {library} cannot be loaded ({error}): "
                "install the driver, start the container with its GPUs, or choose another transport"
            ) from error
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise BackendUnavailable(f"the NVIDIA driver is too old: it has no {name}")
            function.restype, function.argtypes = c_int, arguments
        self._devices: dict[int, _Device] = {}
        self._call(BackendUnavailable, "cuInit", 0)
        count = c_int()
        self._call(BackendUnavailable, "cuDeviceGetCount", byref(count))
        self._num_devices = count.value

    def devices(self) -> list[tuple[str, int]]:
        """Return each device's name and bytes of memory. Raises: `BackendUnavailable`."""
        found = []
        for device in range(self._num_devices):
            name, total, number = create_string_buffer(256), c_size_t(), self._number(device)
            self._call(BackendUnavailable, "cuDeviceGetName", name, len(name), number)
            self._call(BackendUnavailable, "cuDeviceTotalMem_v2", byref(total), number)
            found.append((name.value.decode(errors="replace"), total.value))
        return found

    def allocate(self, device: int, num_bytes: int) -> int:
        """Return the address of memory that is the process's until it ends.

        For checks, which need no torch. Raises: `BackendUnavailable`.
        """
        address = c_uint64()
        with self._current(device):
            self._call(BackendUnavailable, "cuMemAlloc_v2", byref(address), num_bytes)
        return address.value

    def uuid(self, device: int) -> bytes:
        """Return the 16 bytes that name a device. Raises: `BackendUnavailable`."""
        uuid = Uuid()
        number = self._number(device)
        self._call(BackendUnavailable, "cuDeviceGetUuid_v2", byref(uuid), number)
        return bytes(uuid.bytes)

    def find(self, uuid: bytes) -> int | None:
        """Return the device of that name, or None when this process does not see it."""
        return next((i for i in range(self._num_devices) if self.uuid(i) == uuid), None)

    def can_reach(self, device: int, other: int) -> bool:
        """Tell whether a device reads memory of another one."""
        answer = c_int()
        numbers = self._number(device), self._number(other)
        self._call(BackendUnavailable, "cuDeviceCanAccessPeer", byref(answer), *numbers)
        return device == other or bool(answer.value)

    def export(self, device: int, address: int) -> Exported:
        """Return how others map the allocation around an address. Raises: `BackendUnavailable`."""
        base, size, handle = c_uint64(), c_size_t(), IpcHandle()
        with self._current(device):
            self._call(
                BackendUnavailable, "cuMemGetAddressRange_v2", byref(base), byref(size), address
            )
            try:
                self._call(BackendUnavailable, "cuIpcGetMemHandle", byref(handle), base)
            except BackendUnavailable as error:
                raise BackendUnavailable(
                    f"{error}: memory that cudaMalloc did not make cannot be shared; with "
                    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True torch makes such memory"
                ) from error
        return Exported(bytes(handle.reserved), address - base.value)

    def map(self, device: int, handle: bytes) -> Mapped:
        """Map an allocation of another process for a device. Raises: `PeerLost`."""
        address, base, size = c_uint64(), c_uint64(), c_size_t()
        passed = IpcHandle.from_buffer_copy(handle)
        with self._current(device):
            self._call(
                PeerLost, "cuIpcOpenMemHandle_v2", byref(address), passed, LAZY_ENABLE_PEER_ACCESS
            )
            self._call(PeerLost, "cuMemGetAddressRange_v2", byref(base), byref(size), address)
        return Mapped(address.value, base.value + size.value - address.value)

    def unmap(self, device: int, address: int) -> None:
        """Undo one `map`."""
        with self._current(device):
            # What the owner has freed meanwhile may be refused: it is gone either way.
            self._library.cuIpcCloseMemHandle(address)

    def pin(self, device: int, address: int, num_bytes: int) -> None:
        """Keep pages of the host where they are. Raises: `BackendUnavailable`."""
        with self._current(device):
            self._call(
                BackendUnavailable, "cuMemHostRegister_v2", address, num_bytes, HOST_PORTABLE
            )

    def unpin(self, device: int, address: int) -> None:
        """Undo one `pin`."""
        with self._current(device):
            self._library.cuMemHostUnregister(address)

    def copy(self, device: int, copies: Sequence[Copy]) -> None:
        """Start copies on a stream that waits for nobody else's. Raises: `PeerLost`."""
        with self._current(device) as used:
            if used.event.value is None:
                self._open_stream(used)
            try:
                for one in copies:
                    self._call(PeerLost, "cuMemcpyAsync", *one, used.stream)
            finally:
                # Also behind those that were started before one failed: they are waited for.
                self._call(PeerLost, "cuEventRecord", used.event, used.stream)

    def is_done(self, device: int) -> bool:
        """Tell whether all copies that were started have ended. Raises: `PeerLost`."""
        with self._current(device) as used:
            if used.event.value is None:
                return True
            result = self._library.cuEventQuery(used.event)
            if result != NOT_READY:
                self._check(PeerLost, "cuEventQuery", result)
            return bool(result != NOT_READY)

    def _open_stream(self, used: _Device) -> None:
        stream, event = c_void_p(), c_void_p()
        self._call(PeerLost, "cuStreamCreate", byref(stream), STREAM_NON_BLOCKING)
        self._call(PeerLost, "cuEventCreate", byref(event), EVENT_DISABLE_TIMING)
        used.stream, used.event = stream, event

    @contextmanager
    def _current(self, device: int) -> Iterator[_Device]:
        if device not in self._devices:
            context, number = c_void_p(), self._number(device)
            self._call(BackendUnavailable, "cuDevicePrimaryCtxRetain", byref(context), number)
            self._devices[device] = _Device(number, context)
        used = self._devices[device]
        self._call(BackendUnavailable, "cuCtxPushCurrent_v2", used.context)
        try:
            yield used
        finally:
            self._library.cuCtxPopCurrent_v2(byref(c_void_p()))

    def _number(self, device: int) -> int:
        number = c_int()
        self._call(BackendUnavailable, "cuDeviceGet", byref(number), device)
        return number.value

    def _call(self, kind: type[PenstockError], name: str, *arguments: object) -> None:
        self._check(kind, name, getattr(self._library, name)(*arguments))

    def _check(self, kind: type[PenstockError], name: str, result: int) -> None:
        if result == 0:
            return
        text = c_char_p()
        self._library.cuGetErrorName(result, byref(text))
        raise kind(f"{name} says {(text.value or b'an unknown error').decode()} ({result})")
