"""Moves a tensor between two Python programs with `penstock.transport.Agent`, and nothing else.

    python examples/move_tensor.py                      both programs, one after the other
    python examples/move_tensor.py --transport tcp      over TCP, as between two hosts
    python examples/move_tensor.py --own-memory         out of a tensor that existed before

Across two hosts: run `... serve` on one, copy the line that it prints, `... fetch LINE` on the
other, with the same PENSTOCK_CLUSTER_KEY on both, and `--host` with the first one's address.

A tensor is moved in blocks along its first dimension. The one who has it registers it and gives its
descriptor away; the one who wants it pulls the blocks that it wants, in any order, and says when it
is done. The first program takes no part in the copy: it could be computing.
"""

import argparse
import subprocess
import sys
import time
from base64 import b64decode, b64encode

import numpy as np
import torch

from penstock.transport import Agent

SHAPE = (64, 256, 256)
WAIT_S = 60.0


def make_tensor() -> torch.Tensor:
    """Return the tensor that is moved, 16 MiB."""
    return torch.arange(64 * 256 * 256, dtype=torch.float32).reshape(SHAPE)


def serve(options: argparse.Namespace) -> None:
    """Have a tensor, until somebody says that it has arrived."""
    with Agent("giver", transport=options.transport, host=options.host) as agent:
        tensor = make_tensor()
        if options.own_memory:
            agent.register(tensor.view(torch.uint8).numpy())
        else:
            # Memory that a program on the same host can map: the fastest way.
            region = agent.allocate(SHAPE[0], tensor[0].nbytes)
            torch.from_numpy(region.blocks).view(torch.float32).view(SHAPE).copy_(tensor)
        print(b64encode(agent.descriptor()).decode(), flush=True)
        deadline = time.monotonic() + WAIT_S
        while not (said := agent.notifications()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for name, data in said:
            print(f"{name} says: {data.decode()}", flush=True)


def fetch(options: argparse.Namespace) -> None:
    """Pull every second block of the tensor, backwards."""
    with Agent("taker", transport=options.transport) as agent:
        wanted = np.arange(SHAPE[0] - 1, 0, -2)
        into = torch.empty((len(wanted), *SHAPE[1:]))
        region = agent.register(into.view(torch.uint8).numpy())
        peer = agent.connect(b64decode(options.descriptor))
        pulled = agent.pull(peer, wanted, region, np.arange(len(wanted)))
        agent.notify(peer, b"thank you")
    assert torch.equal(into, make_tensor()[wanted.tolist()])
    print(
        f"{pulled.num_bytes >> 20} MiB over {pulled.transport} in {pulled.num_spans} spans, "
        f"{pulled.num_bytes / pulled.seconds / 1e9:.1f} GB/s with the opening; every value is right"
    )


def both(options: argparse.Namespace) -> None:
    """Start the giver as a program of its own, and be the taker."""
    command = [sys.executable, __file__, "--transport", options.transport, "serve"]
    command[2:2] = ["--own-memory"] if options.own_memory else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as giver:
        assert giver.stdout is not None
        options.descriptor = giver.stdout.readline().strip()
        fetch(options)
        print(giver.stdout.read().strip())


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--transport", choices=("auto", "shm", "nixl", "tcp"), default="auto")
    parser.add_argument("--own-memory", action="store_true", help="register, do not allocate")
    parser.add_argument("--host", default="127.0.0.1", help="where `serve` listens")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("serve")
    commands.add_parser("fetch").add_argument("descriptor")
    options = parser.parse_args()
    {"serve": serve, "fetch": fetch, None: both}[options.command](options)


if __name__ == "__main__":
    main()
