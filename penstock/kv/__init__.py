"""Where KV blocks are: allocation in long runs, prefix cache, and a worker's facade (pure)."""
