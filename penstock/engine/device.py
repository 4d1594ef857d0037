"""Where a model runs: the CPU, a CUDA device, or the CPU under Triton's interpreter.

Owns the names of devices and what kernels must know of one. Does not know workers: which of them
gets which device is said where they are composed. Asking after a CUDA device initialises CUDA, and
a process that has done so must not be forked: `probe_cuda` asks in a child of its own.
"""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import torch
from msgspec import Struct

from penstock.core.errors import StartupFailed

if TYPE_CHECKING:
    from collections.abc import Callable

CUDA: Final = "cuda"
INTERPRETER: Final = "interpreter"
H200_MULTIPROCESSORS: Final = 132
CUDA_TIMEOUT_S: Final = 120.0
"""For the driver to say which GPUs there are; the first call may take many seconds."""
_PIPE_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Device:
    """A device by its kind: "cpu", "cuda", or "interpreter" (the CUDA kernels on CPU tensors)."""

    kind: str
    index: int = 0
    num_multiprocessors: int = H200_MULTIPROCESSORS

    @property
    def torch_device(self) -> torch.device:
        """The device that tensors are on."""
        return torch.device(CUDA, self.index) if self.kind == CUDA else torch.device("cpu")

    @property
    def is_cuda(self) -> bool:
        """True where tensors are in a GPU's memory."""
        return self.kind == CUDA

    @property
    def has_triton(self) -> bool:
        """True where the Triton kernels run."""
        return self.kind != "cpu"


CPU: Final = Device("cpu")


class CudaFacts(Struct, frozen=True):
    """A CUDA device as the driver has it: name, memory in all and free, in bytes."""

    name: str
    total_bytes: int
    free_bytes: int


def find_device(name: str) -> Device:
    """Return a device by name: cpu, cuda, cuda:N or interpreter. Initialises CUDA if it is one.

    Raises: `StartupFailed` saying what to do where it cannot be used.
    """
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return CPU
    if kind == INTERPRETER:
        _check_triton(is_interpreted=True)
        # Few, so that splits are tried as well where batches are small.
        return Device(INTERPRETER, num_multiprocessors=8)
    if kind != CUDA or (index and not index.isdecimal()):
        raise StartupFailed(f"--device {name}: it is none of cpu, cuda, cuda:N and auto")
    _check_triton(is_interpreted=False)
    number = int(index or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise StartupFailed(no_cuda(name))
    properties = torch.cuda.get_device_properties(number)
    return Device(CUDA, number, properties.multi_processor_count)


def no_cuda(name: str) -> str:
    """Say why a CUDA device cannot be used here, and what to do about it."""
    if torch.version.cuda is None:
        return (
            f"--device {name}: this torch ({torch.__version__}) is built without CUDA: install "
            "the one for CUDA (pip install torch --index-url of your CUDA version, see "
            "pytorch.org), or use --device cpu"
        )
    return (
        f"--device {name}: torch {torch.__version__} (CUDA {torch.version.cuda}) finds no such "
        "GPU: see that nvidia-smi lists it, that its driver is new enough and that "
        "CUDA_VISIBLE_DEVICES does not hide it, or use --device cpu"
    )


def probe_cuda() -> tuple[CudaFacts, ...]:
    """Return the CUDA devices, asked for in a child process: this one can still be forked.

    Raises: `StartupFailed` when the driver does not answer.
    """
    if torch.version.cuda is None:
        return ()
    try:
        answer = in_child(_ask, CUDA_TIMEOUT_S)
    except TimeoutError as error:
        raise StartupFailed(
            f"--device cuda: the driver gives {error}: see nvidia-smi, or use --device cpu"
        ) from None
    return msgspec.json.decode(answer or b"[]", type=tuple[CudaFacts, ...])


def in_child(question: Callable[[], bytes], timeout_s: float) -> bytes:
    """Return what a forked child answers, which may use CUDA; nothing from one that died.

    Raises: `TimeoutError` when it has not ended by then; it is killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.write(writing, question())
        finally:
            os._exit(0)
    os.close(writing)
    deadline, answer = time.monotonic() + timeout_s, b""
    try:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if not (part := pipe.read(_PIPE_BYTES)):
                    return answer
                answer += part
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    finally:
        # One that has answered is ending by itself.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def is_kernel_compiler_present() -> bool:
    """Tell whether Triton is installed, and not set to interpret what it should compile."""
    try:
        import triton
    except ImportError:
        return False
    return not triton.knobs.runtime.interpret


def _ask() -> bytes:
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            found.append(CudaFacts(name, total_bytes, free_bytes))
    return msgspec.json.encode(found)


def _check_triton(*, is_interpreted: bool) -> None:
    try:
        import triton
    except ImportError as error:
        raise StartupFailed(
            "the CUDA kernels need Triton, which is not installed: pip install 'penstock[cuda]', "
            "or use --device cpu"
        ) from error
    if triton.knobs.runtime.interpret != is_interpreted:
        wanted = "set TRITON_INTERPRET=1" if is_interpreted else "unset TRITON_INTERPRET"
        raise StartupFailed(f"{wanted}: Triton decides by it whether kernels are interpreted")
