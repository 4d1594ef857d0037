"""Floor 0: the vocabulary. Types, requests, blocks, events, ports, and the node that drives a core."""
