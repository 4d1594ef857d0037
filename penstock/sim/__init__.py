"""Floor 5: the same cores under a simulated clock, executor and network."""
