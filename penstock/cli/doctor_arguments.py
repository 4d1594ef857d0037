"""What may be said to `penstock doctor`. Parses and explains; `penstock/cli/doctor.py` acts."""

import argparse
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

SERVER: Final = "http://127.0.0.1:8000"

_EXAMPLES = """\
examples:
  penstock doctor                             look at everything, about five seconds
  penstock doctor --quick                     without torch, and compiling nothing
  penstock doctor --json | jq .is_ok          for a script; exit status 1 when something failed
  penstock doctor --listen 0.0.0.0:7000       let other hosts try the hand-off with this one
  penstock doctor 10.0.0.5:7000               try it with the host where that runs
  penstock doctor --cluster                   every pair of workers of the server on this machine
  penstock doctor --cluster http://10.0.0.5:8000 --json         of another one, for a script

The first time the model's kernels are compiled, which takes longer. Between hosts both need the
same cluster key: copy its file (0600), or set PENSTOCK_CLUSTER_KEY.
"""


def add_doctor(commands: "Commands") -> None:
    """Add `penstock doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="look at this machine and installation",
        description=(
            "Tell what this machine and installation can do, measured, and what to do about what "
            "they cannot."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on standard output")
    add("--quick", action="store_true", help="import no torch, compile nothing, move less")
    add(
        "peers",
        nargs="?",
        type=addresses,
        default=[],
        metavar="HOST:PORT[,HOST:PORT]",
        help="only try the hand-off, with the hosts where `penstock doctor --listen` runs",
    )
    add(
        "--cluster",
        nargs="?",
        const=SERVER,
        metavar="URL",
        help=f"only the hand-off between the workers of a server that runs (default: {SERVER}): "
        "for every pair which transports are possible and why not the others, how long opening "
        "takes, rates beside their limits, clocks, and whether their KV goes together",
    )
    add(
        "--api-key",
        default=os.environ.get("PENSTOCK_API_KEY"),
        metavar="KEY",
        help="that server's (default: $PENSTOCK_API_KEY)",
    )
    add(
        "--listen",
        type=address,
        metavar="HOST:PORT",
        help="let `penstock doctor HOST:PORT` of other hosts, with the same cluster key, read here",
    )


def address(text: str) -> tuple[str, int]:
    """Return a host and a port: `10.0.0.5:7000`, `[::1]:7000`.

    Raises: `argparse.ArgumentTypeError` for anything else.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def addresses(text: str) -> list[tuple[str, int]]:
    """Return several, told apart by commas. Raises: `argparse.ArgumentTypeError`."""
    return [address(part.strip()) for part in text.split(",")]
