"""What the device can do at most: a plain copy, and a large matrix product."""

from __future__ import annotations

from h200.lab import Lab, Measure

COPY_BYTES = 2 << 30
SIDE = 8192


def copy(lab: Lab) -> None:
    """Copy from memory to memory; bytes read and written, both counted."""
    num_bytes = lab.pick(COPY_BYTES, 1 << 16)
    source, target = lab.normal(num_bytes // 2), lab.normal(num_bytes // 2)
    times = lab.seconds(lambda _: target.copy_(source), 10)
    rates = [2 * num_bytes / seconds / 1e12 for seconds in times]
    lab.add("copy", rates, "TB/s")


def product(lab: Lab) -> None:
    """Multiply square matrices in bfloat16."""
    side = lab.pick(SIDE, 32)
    a, b = lab.normal(side, side), lab.normal(side, side)
    times = lab.seconds(lambda _: a @ b, 20)
    rates = [2 * side**3 / seconds / 1e12 for seconds in times]
    lab.add("product", rates, "TFLOP/s")


MEASURES = Measure("copy", copy), Measure("product", product)
