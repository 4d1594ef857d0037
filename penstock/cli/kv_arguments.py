"""What may be said to `penstock kv`."""

import argparse
import os
from typing import TYPE_CHECKING

from penstock.cli.values import positive

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """\
examples:
  penstock kv                                          every worker's pool and tiers
  penstock kv --watch                                  the same, every second
  penstock kv --blocks --limit 20                      single blocks, a page of them
  penstock kv --request cmpl-3f1c09a7b2d84e5560718293  what a request under way holds
  penstock kv --prefix 3fa9                            blocks whose name begins so
  penstock kv --url http://10.0.0.5:8000 --json        as GET /kv/residency answers
"""


def add_kv(commands: "Commands") -> None:
    """Add `penstock kv`."""
    parser = commands.add_parser(
        "kv",
        help="where the KV blocks are, in which codec, and how warm",
        description="Say where every KV block of a running cluster is: in which worker's pool or "
        "tier, in which codec, how warm, and what is being copied.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    add("--blocks", action="store_true", help="show single blocks as well")
    add("--worker", metavar="ID", help="this worker only")
    add("--request", metavar="ID", help="blocks of a live request only: id or X-Request-Id")
    add("--prefix", metavar="HEX", help="blocks whose name begins with these digits only")
    add("--limit", type=positive, metavar="N", help="blocks of a page (default: 100, at most 1000)")
    add("--after", metavar="NEXT", help="the page that follows another, as that one said")
    add(
        "--watch",
        type=_seconds,
        nargs="?",
        const=1.0,
        metavar="SECONDS",
        help="show it anew every so many seconds (default 1) until Ctrl-C",
    )
    add("--json", action="store_true", help="the answer as JSON; with --watch a line each time")
    add(
        "--api-key",
        default=os.environ.get("PENSTOCK_API_KEY"),
        metavar="KEY",
        help="default: $PENSTOCK_API_KEY",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return seconds
