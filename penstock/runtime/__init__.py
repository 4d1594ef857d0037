"""Floor 4: processes, threads and messages of a real cluster. The cores know none of it."""
