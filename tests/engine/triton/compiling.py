"""Compiles launches for Hopper without a GPU, and reads out of the machine code what a test asks.

`Compiler` takes the place of a GPU under Triton: a launcher that is called with CPU tensors goes
all the way through Triton's own choice of types and alignments, is compiled, and is not run.
"""

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Code:
    """What one kernel has become. Counts are of instructions in the machine code."""

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    spills: int
    warp_group_products: int
    warp_products: int
    wide_async_copies: int
    narrow_async_copies: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int


class Compiler:
    """Collects the code of every launch while it is active."""

    def __init__(self) -> None:
        self.codes: list[Code] = []
        self._run = JITFunction.run

    def __enter__(self) -> "Compiler":
        compiler = self
        triton.runtime.driver.set_active(Hopper())

        def compile_only(self, *args, grid, warmup, **kwargs):
            kernel = compiler._run(self, *args, grid=grid, warmup=True, **kwargs)
            compiler.codes.append(read_code(kernel))

        JITFunction.run = compile_only
        return self

    def __exit__(self, *error: object) -> None:
        JITFunction.run = self._run

    def take(self) -> list[dict[str, object]]:
        """Return what was compiled since the last call."""
        codes, self.codes = self.codes, []
        return [asdict(code) for code in codes]


def read_code(kernel) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [TOOL, what, file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return Code(
        kernel=kernel.name,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=kernel.metadata.shared,
        spills=count(r"\b(?:LDL|STL)\b"),
        warp_group_products=count(r"\bHGMMA\."),
        warp_products=count(r"\bHMMA\."),
        wide_async_copies=count(r"\bLDGSTS\.\S*\b128\b"),
        narrow_async_copies=count(r"\bLDGSTS\.(?!\S*\b128\b)"),
        wide_loads=count(r"\bLDG\.\S*\b128\b"),
        narrow_loads=count(r"\bLDG\.(?!\S*\b128\b)"),
        wide_stores=count(r"\bSTG\.\S*\b128\b"),
        narrow_stores=count(r"\bSTG\.(?!\S*\b128\b)"),
    )
