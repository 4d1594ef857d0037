"""Floor 6: the command line, and the only place where everything is put together.

`main` parses and calls the module of the command; nothing heavy is imported before that, so that
`penstock --help` answers at once and `penstock serve` starts to load the model as early as it can.
"""

import sys
from collections.abc import Sequence

from penstock.cli.arguments import make_parser
from penstock.core.errors import PenstockError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, or 1 for a failure that was explained.

    A misuse ends the program with 2, as argparse does.
    """
    options = make_parser().parse_args(arguments)
    try:
        match options.command:
            case "serve":
                from penstock.cli.serve import serve

                return serve(options)
            case "worker":
                from penstock.cli.worker import worker

                return worker(options)
            case "chat":
                from penstock.cli.chat import chat

                return chat(options)
            case "doctor":
                from penstock.cli.doctor import doctor

                return doctor(options)
            case "sim":
                from penstock.cli.sim import sim

                return sim(options)
            case "explain":
                from penstock.cli.explain import explain

                return explain(options)
            case "kv":
                from penstock.cli.kv import kv

                return kv(options)
            case "replay":
                from penstock.cli.replay import replay

                return replay(options)
            case command:
                raise AssertionError(command)
    except PenstockError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
