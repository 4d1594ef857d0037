"""Records a decoder's operations once, and then runs all of them in one native call per step.

Owns the list of operations and the registers between them. A register holds rows; those whose
values are no longer needed are reused. Does not know the model: `kernels/cpu.py` records a forward
by calling it with a `Recorder` in the place of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, Structure, addressof, c_void_p
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import torch

from penstock.engine.native.structs import DTYPES, OperationStruct, batch_struct

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.batch import Batch

Function = Callable[["Tensor"], "Tensor"]

_ALIGNMENT: Final = 64


class Code(IntEnum):
    """Operations; as in `program.cpp`."""

    EMBED = 0
    EMBED_PACKED = 1
    NORM = 2
    ADD = 3
    ADD_NORM = 4
    LINEAR = 5
    HEADS = 6
    ATTEND = 7
    ACTIVATE = 8
    SELECT_ROWS = 9
    CAP = 10
    APPLY = 11


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A result in a recording: rows of `width` elements, the batch's or the selected ones."""

    number: int
    width: int
    dtype: torch.dtype
    on_selected: bool


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One recorded call. `spec` is the struct that it works by, `function` what an APPLY calls."""

    code: Code
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    spec: Structure | Tensor | None = None
    function: Function | None = None
    scale: float = 1.0
    softcap: float = 0.0
    kind: int = 0
    gated: bool = False

    def struct(self, registers: dict[Value, int]) -> OperationStruct:
        """Return it for C++, its values named by the numbers of their registers."""
        first = self.outputs[0]
        # The type of CAP is its input's, because its output is always float32.
        typed = self.inputs[0] if self.code is Code.CAP else first
        inputs = [registers[value] for value in self.inputs]
        outputs = [registers[value] for value in self.outputs]
        return OperationStruct(
            self.code,
            DTYPES[typed.dtype],
            (*inputs, *[0] * (2 - len(inputs))),
            (*outputs, *[0] * (2 - len(outputs))),
            None if self.spec is None else _address(self.spec),
            # ATTEND wants the stride of its query, which is as wide as its output.
            first.width,
            self.scale,
            self.softcap,
            self.kind,
            self.gated,
            first.on_selected,
        )


@dataclass(slots=True)
class Registers:
    """Assigns values to as few registers as their lifetimes allow; `row_bytes` are the sizes."""

    row_bytes: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)

    def take(self, row_bytes: int) -> int:
        """Return a free register, the smallest that is large enough, or a new or widened one."""
        fitting = [number for number in self.free if self.row_bytes[number] >= row_bytes]
        if fitting:
            number = min(fitting, key=self.row_bytes.__getitem__)
        elif self.free:
            number = max(self.free, key=self.row_bytes.__getitem__)
            self.row_bytes[number] = row_bytes
        else:
            self.row_bytes.append(row_bytes)
            return len(self.row_bytes) - 1
        self.free.remove(number)
        return number

    def assign(self, operations: list[Operation], result: Value) -> dict[Value, int]:
        """Return each value's register; the result gets the number after the last."""
        last_use = {value: i for i, op in enumerate(operations) for value in op.inputs}
        registers: dict[Value, int] = {}
        for i, operation in enumerate(operations):
            for value in operation.outputs:
                if value is not result:
                    size = value.width * value.dtype.itemsize
                    registers[value] = self.take(-(-size // _ALIGNMENT) * _ALIGNMENT)
            for value in {*operation.inputs, *operation.outputs}:
                if value is not result and last_use.get(value, i) == i:
                    self.free.append(registers[value])
        registers[result] = len(self.row_bytes)
        return registers


class Program:
    """A recorded decoder. Not thread-safe: the registers are its own."""

    def __init__(self, library: CDLL, operations: list[Operation], result: Value) -> None:
        """Take a recording and the value that a run returns."""
        registers = Registers()
        self._numbers = registers.assign(operations, result)
        self._row_bytes = registers.row_bytes
        self._operations, self._result = operations, result
        structs = [operation.struct(self._numbers) for operation in operations]
        self._structs = (OperationStruct * len(structs))(*structs)
        self._run = library.penstock_run
        self._addresses = (c_void_p * (len(self._row_bytes) + 1))()
        self._memory, self._rows_max = torch.empty(0, dtype=torch.uint8), 0

    def __call__(self, batch: Batch) -> Tensor:
        """Return the result for a batch, in memory of its own."""
        struct = batch_struct(batch)
        num_rows, num_selected = struct.num_rows, struct.num_logits_rows
        if max(num_rows, num_selected) > self._rows_max:
            self._grow(max(num_rows, num_selected))
        result = torch.empty(
            num_selected if self._result.on_selected else num_rows,
            self._result.width,
            dtype=self._result.dtype,
        )
        self._addresses[len(self._row_bytes)] = result.data_ptr()
        count, position = len(self._operations), 0
        run, structs, addresses = self._run, self._structs, self._addresses
        where = addressof(struct)
        while (position := run(structs, position, count, where, addresses)) < count:
            operation = self._operations[position]
            source, target = (
                result if value is self._result else self._tensor(value, num_rows, num_selected)
                for value in (operation.inputs[0], operation.outputs[0])
            )
            assert operation.function is not None, operation
            target.copy_(operation.function(source))
            position += 1
        return result

    def _grow(self, num_rows: int) -> None:
        """Make room for at least `num_rows` rows in every register."""
        self._rows_max = max(16, 1 << (num_rows - 1).bit_length())
        sizes = [size * self._rows_max for size in self._row_bytes]
        self._memory = torch.empty(sum(sizes) + _ALIGNMENT, dtype=torch.uint8)
        address = self._memory.data_ptr() + -self._memory.data_ptr() % _ALIGNMENT
        for number, size in enumerate(sizes):
            self._addresses[number] = address
            address += size

    def _tensor(self, value: Value, num_rows: int, num_selected: int) -> Tensor:
        """Return a register's rows as a tensor, for torch code."""
        rows = num_selected if value.on_selected else num_rows
        address = self._addresses[self._numbers[value]]
        assert address is not None
        start = address - self._memory.data_ptr()
        size = rows * value.width * value.dtype.itemsize
        return self._memory[start : start + size].view(value.dtype).view(rows, value.width)


def _address(spec: Structure | Tensor) -> int:
    return spec.data_ptr() if isinstance(spec, torch.Tensor) else addressof(spec)
