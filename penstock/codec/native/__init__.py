"""C++ for the codecs: many blocks in one call, without the interpreter.

Plain C ABI. `library` has it compiled once per machine and declares its functions. `codec.py` calls
it; where there is no compiler the numpy reference gives the same bytes, much slower.
"""
