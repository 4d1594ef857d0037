"""How bytes move between pools: one file for each way, and the agent that chooses among them."""
