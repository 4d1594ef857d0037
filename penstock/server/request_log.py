"""One line per finished request, for `--log-requests`.

Owns the form of the line. `generation.py` calls it.
"""

import logging

from penstock.core.errors import PenstockError
from penstock.core.request import Timeline
from penstock.core.types import NS_PER_MS
from penstock.server.choice import Choice

logger = logging.getLogger("penstock.requests")


def log_choice(choice: Choice, failure: PenstockError | None) -> None:
    """Log what one request was and what became of it; -1 where there is no figure."""
    request, timeline = choice.request, choice.timeline
    ttft_ms = tpot_ms = -1.0
    if choice.first_ns:
        ttft_ms = ((choice.delivered_ns or choice.first_ns) - request.arrived_ns) / NS_PER_MS
        if choice.num_tokens > 1:
            tpot_ms = (choice.last_ns - choice.first_ns) / NS_PER_MS / (choice.num_tokens - 1)
    workers, moved = "none", ""
    if timeline is not None:
        names = dict.fromkeys((timeline.prefill_worker, timeline.decode_worker))
        workers = "->".join(filter(None, names)) or "none"
        moved = _moved(timeline)
    logger.info(
        "%s prompt=%d cached=%d output=%d finish=%s ttft_ms=%.2f tpot_ms=%.3f workers=%s%s%s",
        request.request_id,
        len(request.prompt_token_ids),
        choice.cached_tokens,
        choice.num_tokens,
        choice.finish_reason or "none",
        ttft_ms,
        tpot_ms,
        workers,
        moved,
        f" error={str(failure)!r}" if failure is not None else "",
    )


def _moved(timeline: Timeline) -> str:
    """Say how the KV got from one worker to the other; nothing when it did not have to."""
    if not (timeline.pulled_ns and timeline.pull_bytes):
        return ""
    milliseconds = (timeline.pulled_ns - timeline.reserved_ns) / NS_PER_MS
    return (
        f" transport={timeline.transport.replace(' ', '')} pull_bytes={timeline.pull_bytes}"
        f" gb_per_s={timeline.pull_bytes_per_s / 1e9:.2f} spans={timeline.pull_spans}"
        f" pull_ms={milliseconds:.2f}"
    )
