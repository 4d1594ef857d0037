"""How bytes move between pools: one file for each way, and the two that choose among them.

`Agent` is the library for any program, `mover.BlockMover` what a worker uses.
"""

from penstock.transport.agent import Agent, Peer, Pulled

__all__ = ["Agent", "Peer", "Pulled"]
