"""Names for what a Triton kernel is given, so that its signature can be read.

Not `int` and `float`: by those Triton would take a width of 32 bits for settled, and would not look
at the value, though from a stride that 16 divides it concludes that loads may be 16 bytes wide.
Triton looks the names up when it compiles, so they are its own types and imported at run time.
"""

from typing import TypeAlias

import triton.language as tl

Pointer: TypeAlias = tl.pointer_type
"""A tensor's first element; the launcher says shape and dtype."""
Size: TypeAlias = tl.tensor
"""A count or a stride, in elements."""
Scalar: TypeAlias = tl.tensor
"""A float32 number, the same for the whole launch."""
Tile: TypeAlias = tl.tensor
"""A tensor in registers, or a number that a program has computed."""
