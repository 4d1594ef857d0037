"""Checks of the hand-off between the workers of a cluster that runs: every pair, each way.

The workers try and measure it themselves, one after the other; this asks the server for it and says
what it means. What is not possible for many pairs for one reason is said once.
"""

from collections.abc import Iterator
from typing import Any, Final

from penstock.cli.checks.finding import Extent, Finding, State, failed, ok, warning
from penstock.cli.checks.rates import SHARE_MIN
from penstock.cli.client import ChatClient
from penstock.core.errors import PenstockError, WorkersUnavailable

SKEW_S_MAX: Final = 1e-3
OURS: Final = ("shm", "tcp")
_FEW_PAIRS: Final = 6
"""Up to so many are named."""

Json = dict[str, Any]
Refusals = dict[tuple[str, str], list[str]]
"""The pairs for which a transport is refused, by kind and reason."""


def check_links(extent: Extent, client: ChatClient) -> Iterator[Finding]:
    """Have every worker of the server try its links to all the others."""
    try:
        workers = [worker["id"] for worker in client.get("/cluster")["workers"]]
    except PenstockError as error:
        is_loading = isinstance(error, WorkersUnavailable) and "loading" in str(error)
        advice = _LOADING if is_loading else "say --cluster URL and --api-key KEY as it has them"
        yield failed("server", str(error), advice)
        return
    if len(workers) < 2:
        yield ok("workers", f"{len(workers)} up: there is no pair to hand anything over")
        return
    refusals: Refusals = {}
    for reader in workers:
        try:
            found = client.post(
                f"/cluster/workers/{reader}/links", {"moved_bytes": extent.moved_bytes}
            )
        except PenstockError as error:
            yield failed(reader, f"did not try its links: {error}", "look at its log, or retire it")
            continue
        missing = set(workers) - {reader} - {link["owner"] for link in found["links"]}
        for owner in sorted(missing):
            yield warning(f"{reader} ← {owner}", "they do not know each other", "ask again")
        for link in found["links"]:
            yield _finding(found, link, refusals)
    yield from _refused(refusals, len(workers) * (len(workers) - 1))


def _finding(found: Json, link: Json, refusals: Refusals) -> Finding:
    """Say what one worker found of another's KV."""
    name = f"{found['reader']} ← {link['owner']}"
    open_ways = [way for way in link["ways"] if not way["refusal"]]
    for way in link["ways"]:
        if way["refusal"]:
            reason = way["refusal"].replace(link["owner"], "the owner")
            refusals.setdefault((way["kind"], reason), []).append(name)
    said = [_said_of(way) for way in open_ways] + [_clock(link), _layouts(found, link)]
    advice = _advice(link, open_ways)
    figures = _figures(link, open_ways)
    sentence = "; ".join(said)
    if link["incompatibility"]:
        return failed(name, sentence, "serve one model and revision on all workers", **figures)
    if not any(way["used"] for way in open_ways):
        return failed(name, f"no transport leads there: {sentence}", _NO_WAY, **figures)
    if advice:
        return Finding(
            name=name, state=State.WARNING, said=sentence, advice=advice, figures=figures
        )
    return ok(name, sentence, **figures)


def _said_of(way: Json) -> str:
    rate = f"{way['name']} {way['bytes_per_s'] / 1e9:.2f} GB/s"
    if way["share"]:
        rate += f", {way['share']:.2f} of {way['limit']}"
    used = "" if way["used"] else " (not used)"
    return f"{rate}, opened in {way['opening_s'] * 1e3:.1f} ms{used}"


def _clock(link: Json) -> str:
    if link["clock_skew_s"] is None:
        return "its clock was not told"
    skew_us, within_us = link["clock_skew_s"] * 1e6, link["clock_skew_within_s"] * 1e6
    return f"clocks {skew_us:+,.0f} µs apart, known to {within_us:,.0f}"


def _layouts(found: Json, link: Json) -> str:
    ours, theirs = found["fingerprint"], link["fingerprint"]
    if link["incompatibility"]:
        return str(link["incompatibility"])
    if ours == theirs:
        return f"KV {ours} on both sides"
    return f"KV {theirs} there, {ours} here: cut on the way"


def _advice(link: Json, open_ways: list[Json]) -> str:
    """Return the next step for what works less well than it could, "" when nothing does."""
    for way in open_ways:
        if way["used"] and way["kind"] in OURS and 0 < way["share"] < SHARE_MIN:
            return f"{way['kind']} is slow: is the machine busy, is the native transport built?"
    if link["clock_skew_s"] is None:
        return "messages between the two do not come through: look at the owner's log"
    if abs(link["clock_skew_s"]) > max(SKEW_S_MAX, link["clock_skew_within_s"]):
        return "ledgers of requests that cross here are off by that: wait, clocks are being fitted"
    return ""


def _figures(link: Json, open_ways: list[Json]) -> dict[str, float]:
    figures = {"clock_skew_s": link["clock_skew_s"] or 0.0}
    for way in open_ways:
        figures[f"{way['kind']}_bytes_per_s"] = way["bytes_per_s"]
        figures[f"{way['kind']}_share"] = way["share"]
        figures[f"{way['kind']}_opening_s"] = way["opening_s"]
    return figures


def _refused(refusals: Refusals, num_pairs: int) -> Iterator[Finding]:
    for (kind, reason), pairs in refusals.items():
        which = f"{len(pairs)} of {num_pairs} pairs"
        if len(pairs) < num_pairs and len(pairs) <= _FEW_PAIRS:
            which = ", ".join(pairs)
        yield ok(kind, f"not possible for {which}: {reason}")


_LOADING: Final = "ask again when it is ready: GET /health answers 200 then"
_NO_WAY: Final = (
    "workers of one host must run as one user in one PID namespace; those of several need --listen "
    "on the server, open ports and one cluster key"
)
