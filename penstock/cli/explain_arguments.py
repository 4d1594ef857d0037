"""What may be said to `penstock explain`."""

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """\
examples:
  penstock explain cmpl-3f1c09a7b2d84e5560718293             the id of a response
  penstock explain my-id --json                              the X-Request-Id that a client sent
  penstock explain my-id --log run.log                       after penstock serve --decision-log

A running server knows its last 1000 requests; a decision log has them all. Costs are what the
policy compared: the least of the open ones was taken.
"""


def add_explain(commands: "Commands") -> None:
    """Add `penstock explain`."""
    parser = commands.add_parser(
        "explain",
        help="why a request went where it went",
        description="Say why a request went where it went: who was considered, what was predicted "
        "and what came of it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("request_id", metavar="REQUEST_ID", help="X-Request-Id or id of a response")
    add("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    add("--log", metavar="FILE", help="look in this decision log instead of asking a server")
    add("--json", action="store_true", help="a list of explanations as JSON")
    add(
        "--api-key",
        default=os.environ.get("PENSTOCK_API_KEY"),
        metavar="KEY",
        help="default: $PENSTOCK_API_KEY",
    )
