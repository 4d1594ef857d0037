"""Floor 2: one worker's decisions, whatever its role."""
