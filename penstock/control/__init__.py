"""Floor 2: cluster-wide decisions."""
