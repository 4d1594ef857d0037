"""Floor 0: the vocabulary. Types, requests, blocks, events, ports, and what drives a core."""
