"""C++ for what must not wait for the interpreter: copies of many spans, and both ends of TCP.

Plain C ABI. `library` has it compiled once per machine and declares its functions. Used by
`shm.py`, `tcp.py` and `tcp_owner.py`, which do the same in Python, slower, where there is no
compiler.
"""
