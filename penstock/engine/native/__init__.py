"""C++ kernels for the CPU: their sources, and how Python calls them.

Plain C ABI and no torch headers, so that the system's compiler builds them in seconds and any torch
will do. `library` has them compiled once per machine, loads the result and declares its functions,
`structs` mirrors `api.h`, `program` runs a recorded decoder in one call. Used by
`attention/cpu.py`, `kernels/cpu.py` and `linear.py`, and by nothing else.
"""
