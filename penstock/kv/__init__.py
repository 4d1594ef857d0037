"""Where KV blocks are: allocation in long runs, prefix cache, and the facade that a worker asks
(pure).
"""
