"""What may be said on the command line. Parses and explains; decides nothing and imports little."""

import argparse
import os

from penstock.cli.control_arguments import add_scheduling
from penstock.cli.doctor_arguments import add_doctor
from penstock.cli.explain_arguments import add_explain
from penstock.cli.kv_arguments import add_kv
from penstock.cli.sim_arguments import add_replay, add_sim
from penstock.cli.values import count, port, positive
from penstock.cli.worker_arguments import add_device, add_limits, add_network, add_worker
from penstock.core.version import VERSION

_DESCRIPTION = "Serve large language models with prefill and decode on separate workers."

_EXAMPLES = """\
examples:
  penstock serve                              the built-in model, one prefill and one decode worker
  penstock serve ./Qwen3-0.6B --decode 2      a folder with a Hugging Face model
  penstock serve --mixed 1                    one worker that does both
  penstock worker --join 10.0.0.5:7777        add a worker of this host to a server elsewhere
  penstock chat                               talk to a server on this machine
  penstock explain REQUEST_ID                 why a request went where it went
  penstock kv                                 where the KV blocks are
  penstock doctor                             what this machine can do, and what it lacks
  penstock sim serve --help                   simulate a cluster of GPUs: none is needed
  penstock replay run.log                     simulate a recorded run with one thing changed
"""

_SERVE_EXAMPLES = """\
examples:
  penstock serve
  penstock serve Qwen/Qwen3-0.6B --prefill 1 --decode 2 --port 9000
  penstock serve ./model --mixed 1 --kv-cache-memory 2GiB --max-model-len 8192
  penstock serve --api-key secret --log-requests
  penstock serve --prefill 2 --decode 2 --slo-ttft-ms 2000 --slo-tpot-ms 50
  penstock serve --min-workers 2 --max-workers 6                 workers come and go with the load
  penstock serve --policy round_robin --no-role-switching --handoff whole       to compare with
  penstock serve --listen 0.0.0.0:7777        and then, on another host: penstock worker --join ...
  penstock serve --prefill 0 --decode 0 --listen 0.0.0.0:7777      with workers of other hosts alone

The API is that of OpenAI: /v1/chat/completions, /v1/completions, /v1/models; beside it /health,
/metrics and /docs. Ctrl-C finishes the requests under way; a second one ends at once.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="penstock",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"penstock {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    add_worker(commands)
    _add_chat(commands)
    add_doctor(commands)
    add_explain(commands)
    add_kv(commands)
    add_sim(commands)
    add_replay(commands)
    return parser


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP with the OpenAI API.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, or a name on the Hugging Face hub (default: the built-in model)",
    )
    workers = parser.add_argument_group("workers")
    _add_workers(workers)
    add_limits(workers)
    add_scheduling(parser.add_argument_group("scheduling"))
    add_network(parser.add_argument_group("other hosts"))
    _add_model(parser.add_argument_group("model"))
    _add_http(parser.add_argument_group("HTTP"))
    _add_logs(parser.add_argument_group("logs"))
    # For measuring everything but the model (bench/): says loudly that no model runs.
    parser.add_argument(
        "--executor", choices=("model", "instant"), default="model", help=argparse.SUPPRESS
    )


def _add_workers(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--prefill", type=count, metavar="N", help="prefill workers (default: 1)")
    add("--decode", type=count, metavar="N", help="decode workers (default: 1)")
    add(
        "--mixed",
        type=count,
        default=0,
        metavar="N",
        help="workers that do both (default: 0; alone, it makes the other two default to 0)",
    )
    add(
        "--block-size",
        type=int,
        choices=(16, 32, 64, 128),
        default=32,
        help="tokens of a KV block (default: 32)",
    )


def _add_model(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of weights and KV (default: auto)",
    )
    add_device(group, default="cpu")
    add(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="longest sequence, prompt and output (default: what the model was made for)",
    )
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights, for measuring (default: auto)",
    )
    add(
        "--model-impl",
        choices=("auto", "penstock", "transformers"),
        default="auto",
        help="which code runs the model (default: auto)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit on the hub")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--seed", type=int, default=0, metavar="N", help="seed of dummy weights (default: 0)")


def _add_http(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=port, default=8000, help="port (default: 8000; 0 takes a free one)")
    add("--uds", metavar="PATH", help="listen at this Unix socket instead")
    add(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that the model answers to (default: the last part of MODEL)",
    )
    add(
        "--api-key",
        action="append",
        metavar="KEY",
        help="ask clients for this key; may be given several times (default: $PENSTOCK_API_KEY)",
    )


def _add_logs(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--log-requests", action="store_true", help="a line for every finished request")
    add(
        "--decision-log",
        metavar="PATH",
        help="write what the controller and the workers (PATH.<worker>) decide, as JSON lines",
    )
    add(
        "--record-kv-access",
        metavar="PATH",
        help="write which KV blocks every decode step attends to, with what share of its "
        "attention, to PATH.<pid of the worker>, for penstock sim memory --accesses: traces of "
        "real decoding are not published. Steps are several times slower meanwhile",
    )


def _add_chat(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a server in the terminal",
        description="Talk to a server in the terminal; /reset starts afresh, /quit ends.",
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    add("--model", help="name of the model (default: the first that is served)")
    add("--system", metavar="TEXT", help="system message")
    add("--max-tokens", type=positive, metavar="N", help="longest answer (default: the server's)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the server's)")
    add("--seed", type=int, metavar="N", help="make answers repeatable")
    add(
        "--api-key",
        default=os.environ.get("PENSTOCK_API_KEY"),
        metavar="KEY",
        help="default: $PENSTOCK_API_KEY",
    )
