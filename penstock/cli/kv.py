"""`penstock kv`: where the KV blocks of a running cluster are, as a table.

Asks `GET /kv/residency` and prints what it says; knows nothing else of the cluster.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from penstock.core.errors import BadRequest

_TOP = f"{'place':<26}{'blocks':>9}{'active':>9}{'cached':>9}{'free':>9}{'longest run':>13}  codec"
_TIER_TOP = (
    f"{'place':<26}{'slots':>9}{'used':>9}{'hits':>9}{'in':>10}{'out':>10}{'exposed':>11}"
    f"{'moving':>9}  codec"
)
_BLOCK_TOP = (
    f"{'worker':<14}{'place':<18}{'index':>8}  {'name':<14}{'state':<11}{'codec':<7}{'warmth':<7}"
    f"{'holders':>7}{'idle':>9}{'kept for':>10}{'decode':>9}  in flight"
)
_CLEAR = "\x1b[H\x1b[2J"


def kv(options: Namespace) -> int:
    """Print where blocks are, once or again and again; return the exit code.

    Raises: `PenstockError` when there is no server, or it refuses.
    """
    from penstock.cli.client import ChatClient

    client = ChatClient(options.url, options.api_key)
    path = _path(options)
    while True:
        answer = client.get(path)
        if options.json:
            sys.stdout.write(json.dumps(answer) + "\n")
        else:
            is_screen = options.watch is not None and sys.stdout.isatty()
            print((_CLEAR if is_screen else "") + "\n".join(tell(answer)))
        sys.stdout.flush()
        if options.watch is None:
            return 0 if not answer["silent"] else 1
        time.sleep(options.watch)


def _path(options: Namespace) -> str:
    if options.after and options.watch is not None:
        raise BadRequest("--watch shows the first page anew: leave --after out", "--after")
    asked = {
        name: value
        for name in ("worker", "request", "prefix", "limit", "after")
        if (value := getattr(options, name)) is not None
    }
    if options.blocks:
        asked["detail"] = 1
    return "/kv/residency" + ("?" + urlencode(asked) if asked else "")


def tell(answer: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of an answer of `GET /kv/residency`."""
    for index, worker in enumerate(answer["workers"]):
        yield from [""] * (index > 0)
        yield from _tell_worker(worker)
    for worker in answer["silent"]:
        yield f"{worker}: did not answer in time; the figures are without it"
    if not answer["workers"] and not answer["silent"]:
        yield "no worker is up"
    if answer.get("blocks"):
        yield ""
        yield _BLOCK_TOP
        yield from map(_tell_block, answer["blocks"])
    if answer.get("next"):
        yield f"there are more: --after {answer['next']}"


def _tell_worker(worker: dict[str, Any]) -> Iterator[str]:
    yield _TOP
    for pool in worker["pools"]:
        kind = f" window {pool['window']}" if pool["window"] else ""
        yield (
            f"{worker['id'] + ' device' + kind:<26}{pool['blocks']:>9}{pool['active']:>9}"
            f"{pool['cached']:>9}{pool['free']:>9}{pool['longest_free_run']:>13}  {pool['codec']}"
            + (f", {pool['retained']} retained" if pool["retained"] else "")
        )
    if worker["tiers"]:
        yield _TIER_TOP
    block_bytes = worker["pools"][0]["block_bytes"] if worker["pools"] else 0
    for tier in worker["tiers"]:
        moving = tier["arriving"] + tier["reading"]
        yield (
            f"{worker['id'] + ' ' + tier['name']:<26}{tier['slots']:>9}{tier['used']:>9}"
            f"{tier['hits']:>9}{_size(tier['bytes_in']):>10}{_size(tier['bytes_out']):>10}"
            f"{tier['exposed_ns'] / 1e6:>8.1f} ms{moving:>9}  {tier['codec']}"
            + _codec_costs(tier, block_bytes)
            + (f", {tier['corrupt']} corrupt" if tier["corrupt"] else "")
            + (f", {tier['failed']} failed" if tier["failed"] else "")
        )


def _codec_costs(tier: dict[str, Any], block_bytes: int) -> str:
    """Say how small a codec makes blocks, and the time that it has taken; "" for raw."""
    if tier["slot_bytes"] == block_bytes and not tier["codec_decode_ns"]:
        return ""
    return (
        f" ({tier['slot_bytes'] / block_bytes:.2f} of a block, {tier['decode_ns'] / 1e3:.0f} us to "
        f"decode one; {tier['codec_encode_ns'] / 1e6:.1f} ms in, "
        f"{tier['codec_decode_ns'] / 1e6:.1f} ms out, {tier['codec_exposed_ns'] / 1e6:.1f} exposed)"
    )


def _tell_block(block: dict[str, Any]) -> str:
    idle = block.get("idle_s")
    kept, decode = block.get("retained_s"), block.get("decode_us")
    place = block["place"] + (f" {block['group']}" if block["group"] else "")
    return (
        f"{block['worker']:<14}{place:<18}{block['index']:>8}  {(block['name'] or '-')[:12]:<14}"
        f"{block['state']:<11}{block['codec']:<7}{block['temperature']:<7}{block['holders']:>7}"
        f"{'-' if idle is None else f'{idle:.1f} s':>9}{f'{kept:.0f} s' if kept else '-':>10}"
        f"{f'{decode:.0f} us' if decode else '-':>9}"
        f"  {block.get('in_flight', '')}"
    ).rstrip()


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError(num_bytes)
