"""What may be said of workers and of other hosts, to `penstock worker` and to `penstock serve`."""

import argparse
from typing import TYPE_CHECKING

from penstock.cli.values import kv_quality, kv_tier, parse_bytes, positive, seconds, share
from penstock.kv.quality import KvQuality

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    Group = argparse._ArgumentGroup

_EXAMPLES = """\
examples:
  penstock worker --join 10.0.0.5:7777                            one worker that does both
  penstock worker --join 10.0.0.5:7777 --role decode --workers 2  two decode workers
  penstock worker --join gpu0:7777 --cluster-key-file ./cluster.key --kv-cache-memory 8GiB
  penstock worker --join gpu0:7777 /mnt/models/Qwen3-0.6B         its folder has another place here

The server's host is where `penstock serve --listen` runs; it prints this command. The cluster key
must be the same on both: copy its file (0600), or set PENSTOCK_CLUSTER_KEY. The model is the
cluster's, and so are dtype and block size if nothing else is asked for: between workers that differ
in them KV is converted as it is pulled. Ctrl-C finishes what the workers have and leaves; a second
one leaves at once, and what was not finished is begun again elsewhere.
"""


def add_worker(commands: "Commands") -> None:
    """Add `penstock worker`."""
    parser = commands.add_parser(
        "worker",
        help="add workers of this host to a running cluster",
        description="Add workers of this host to a running cluster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="where the cluster's model lies on this host (default: where it lies there)",
    )
    add("--join", required=True, metavar="HOST:PORT", help="what `penstock serve --listen` prints")
    add(
        "--role",
        choices=("prefill", "decode", "mixed"),
        default="mixed",
        help="what the workers are for (default: mixed, both)",
    )
    add("--workers", type=positive, default=1, metavar="N", help="how many (default: 1)")
    add("--name", metavar="NAME", help="what to call this host (default: its name)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    workers = parser.add_argument_group("workers")
    workers.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type of weights and KV here (default: the cluster's)",
    )
    workers.add_argument(
        "--block-size",
        type=int,
        choices=(16, 32, 64, 128),
        help="tokens of a KV block here (default: the cluster's)",
    )
    add_device(workers, default="cpu")
    add_limits(workers)
    network = parser.add_argument_group("other hosts")
    add_key(network)
    network.add_argument(
        "--host",
        metavar="ADDRESS",
        help="address of this host to listen at (default: the one that the cluster is called from)",
    )
    network.add_argument(
        "--rejoin-timeout",
        type=seconds,
        default=300.0,
        metavar="S",
        help="seconds to look for a cluster that has gone silent (default: 300)",
    )
    add_pulse(network)
    parser.add_argument_group("logs").add_argument(
        "--decision-log",
        metavar="PATH",
        help="write what the workers (PATH.<worker>) decide, as JSON lines",
    )


def add_device(group: "Group", *, default: str) -> None:
    """Add where the model runs."""
    add = group.add_argument
    add(
        "--device",
        default=default,
        metavar="DEVICE",
        help="cpu, cuda (workers are shared out among the GPUs), cuda:N, or auto: a GPU if there "
        f"is one (default: {default})",
    )
    add(
        "--gpu-memory-utilization",
        type=share,
        default=0.9,
        metavar="PART",
        help="part of a GPU's memory that all workers on it take together, in equal shares "
        "(default: 0.9)",
    )
    add(
        "--enforce-eager",
        action="store_true",
        help="on a GPU, launch decode steps operation by operation instead of as CUDA graphs",
    )
    add(
        "--attention-backend",
        choices=("triton", "fa3", "flashinfer"),
        default="triton",
        help="on a GPU, what attends for prompts: our own kernel, or a library that is installed "
        "(default: triton)",
    )


def add_limits(group: "Group") -> None:
    """Add what workers may use, wherever they are started."""
    add = group.add_argument
    add(
        "--threads",
        type=positive,
        metavar="N",
        help="compute threads of each worker (default: the cores, shared out)",
    )
    add("--pin-cores", action="store_true", help="give each worker cores of its own")
    add(
        "--max-num-seqs",
        type=positive,
        default=64,
        metavar="N",
        help="sequences that a worker runs at once (default: 64)",
    )
    add(
        "--max-num-batched-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="new tokens of one step (default: 512)",
    )
    add(
        "--kv-cache-memory",
        type=parse_bytes,
        metavar="SIZE",
        help="KV cache of each worker, such as 1GiB (default: a share of the free memory)",
    )
    _add_tiers(group)
    add(
        "--kv-eviction",
        choices=("lru", "arc", "cost"),
        default="lru",
        help="what a tier gives up first: lru, what was used longest ago; arc, balanced between "
        "what was used once and what was used again; cost, what was used least, with age "
        "(default: lru)",
    )
    _add_crossing(group)
    add("--no-prefix-caching", action="store_true", help="never reuse the KV of equal prefixes")
    add(
        "--shutdown-timeout",
        type=seconds,
        default=10.0,
        metavar="S",
        help="seconds that requests under way have to finish after Ctrl-C (default: 10)",
    )


def _add_crossing(group: "Group") -> None:
    add = group.add_argument
    add(
        "--transport",
        choices=("auto", "shm", "nixl", "tcp"),
        default="auto",
        help="how KV gets from worker to worker (default: auto, the fastest that leads there: "
        "shared memory on one host)",
    )
    add(
        "--tcp-streams",
        type=positive,
        metavar="N",
        help="connections that share a pull over TCP (default: two, or half of the cores up to 4)",
    )
    add(
        "--handoff",
        choices=("stream", "whole", "push"),
        default="stream",
        help="how the KV of a prompt crosses: pulled as its blocks are finished, pulled when all "
        "are, or written by the prefill worker as it computes, on one host (default: stream)",
    )
    add(
        "--handoff-codec",
        choices=("raw", "fp8", "int8", "int4", "sparse"),
        default="raw",
        help="between hosts, KV may cross in this codec where that is sooner, by what the link and "
        "the codec were measured to do; measured on the model and held against --kv-quality "
        "(default: raw)",
    )


def _add_tiers(group: "Group") -> None:
    add = group.add_argument
    add(
        "--kv-tier",
        type=kv_tier,
        action="append",
        default=[],
        metavar="TIER",
        help="keep what falls out of the KV caches in dram=SIZE, cxl=SIZE or disk=FOLDER,SIZE; may "
        "be given for each, nearest first (default: nowhere). With ,codec=NAME blocks lie there as "
        "raw, lossless, fp8, int8, int4 or sparse, or auto: what is quickest within --kv-quality",
    )
    add(
        "--kv-quality",
        type=kv_quality,
        default=KvQuality(),
        metavar="BUDGET",
        help="how much the loss of the model may rise by codecs of tiers and hand-offs: exact "
        "(default: blocks come back bit for bit), or such as 0.1%%, or 0.1%%,99%% with the least "
        "share of greedy tokens that stay the same. Codecs are measured on the model as it is "
        "loaded, and those above the budget refused. Tiers without a codec are then auto; a "
        'request whose body says "kv_quality": "exact" never gets what went through a lossy one',
    )


def add_network(group: "Group") -> None:
    """Add how other hosts take part in a cluster that is served here."""
    group.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="let workers of other hosts join at this address (0.0.0.0 for all of this machine's; "
        "port 0 takes a free one); authenticated and encrypted with the cluster key",
    )
    add_key(group)
    add_pulse(group)


def add_key(group: "Group") -> None:
    """Add how hosts know each other."""
    group.add_argument(
        "--cluster-key-file",
        metavar="PATH",
        help="file with the cluster key, made where there is none (default: $PENSTOCK_CLUSTER_KEY, "
        "or ~/.config/penstock/cluster.key)",
    )
    group.add_argument(
        "--advertise",
        default="",
        metavar="HOST",
        help="what other hosts call this one by, where that is not the address that is listened at",
    )


def add_pulse(group: "Group") -> None:
    """Add when a member counts as dead."""
    add = group.add_argument
    add(
        "--heartbeat-interval",
        type=seconds,
        default=1.0,
        metavar="S",
        help="seconds between two signs of life (default: 1)",
    )
    add(
        "--lost-after",
        type=seconds,
        default=10.0,
        metavar="S",
        help="seconds of silence after which the other side counts as dead (default: 10; it is "
        "suspected after a third of that)",
    )
    add(
        "--step-timeout",
        type=seconds,
        default=300.0,
        metavar="S",
        help="seconds that one step of a worker may take before it counts as stuck (default: 300)",
    )
