"""`penstock explain`: why a request went where it went, what was predicted for it and what it saw.

Asks a running server, or a decision log; both have the same answer.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Final
from urllib.parse import quote

import msgspec

from penstock.core.explain import Candidate, Explanation, Parts

_ROWS: Final = (
    ("queue", "queue_ms"),
    ("prefill", "prefill_ms"),
    ("transfer", "transfer_ms"),
    ("first decode", "first_decode_ms"),
    ("TTFT", "ttft_ms"),
    ("TPOT", "tpot_ms"),
)


def explain(options: Namespace) -> int:
    """Print the explanations of a request; return the exit code.

    Raises: `PenstockError` when nothing is known of it.
    """
    num_differing = 0
    if options.log:
        from penstock.cli.explain_log import LogExplainer

        explainer = LogExplainer(options.log, options.request_id)
        explanations, num_differing = explainer.explain(), explainer.num_differing
    else:
        explanations = _ask(options)
    if options.json:
        sys.stdout.write(msgspec.json.encode(explanations).decode() + "\n")
    else:
        print("\n\n".join("\n".join(tell(one)) for one in explanations))
    if num_differing:
        print(
            f"{num_differing} decisions about it are not what this version decides: the log is of "
            "another one, and the explanation may not be what happened",
            file=sys.stderr,
        )
    return 0


def _ask(options: Namespace) -> list[Explanation]:
    from penstock.cli.client import ChatClient

    client = ChatClient(options.url, options.api_key)
    name = quote(options.request_id, safe="")
    answer = client.get(f"/cluster/requests/{name}/explanation")
    return msgspec.convert(answer["requests"], list[Explanation])


def tell(one: Explanation) -> Iterator[str]:
    """Yield the lines of an explanation."""
    outcome = one.outcome or "under way"
    again = f", attempt {one.attempt}" if one.attempt > 1 else ""
    yield f"{one.request_id}: {outcome}{again}, policy {one.policy}"
    yield (
        f"{one.num_tokens} tokens known, {one.expected_output_tokens} more expected; waited "
        f"{one.waited_ms:.1f} ms, then {_way(one)}"
    )
    yield ""
    yield f"{'ms':<14}{'predicted':>11}{'actual':>11}"
    for label, field in _ROWS:
        yield f"{label:<14}{getattr(one.predicted, field):>11.2f}{_actual(one.actual, field):>11}"
    yield ""
    yield f"{'candidate':<20}{'for':<9}{'cost, ms':>11}{'cached':>8}"
    for candidate in one.candidates:
        yield _tell_candidate(candidate, is_chosen=_is_chosen(one, candidate))


def _way(one: Explanation) -> str:
    if one.is_alone:
        return f"{one.prefill_worker} does both: prefill and decode"
    return f"prefill on {one.prefill_worker}, decode on {one.decode_worker}"


def _actual(actual: Parts | None, field: str) -> str:
    value = getattr(actual, field) if actual is not None else 0.0
    # Without a ledger, or before the last token, there is nothing to say; 0 would be a claim.
    return f"{value:.2f}" if value else "-"


def _is_chosen(one: Explanation, candidate: Candidate) -> bool:
    if one.is_alone:
        return candidate.part == "alone" and candidate.worker_id == one.prefill_worker
    chosen = {"prefill": one.prefill_worker, "decode": one.decode_worker}
    return chosen.get(candidate.part) == candidate.worker_id


def _tell_candidate(candidate: Candidate, *, is_chosen: bool) -> str:
    cost = "-" if candidate.cost_ms is None else f"{candidate.cost_ms:.2f}"
    line = f"{candidate.worker_id:<20}{candidate.part:<9}{cost:>11}{candidate.cached_tokens:>8}"
    return line + ("  chosen" if is_chosen else f"  {candidate.closed}" if candidate.closed else "")
