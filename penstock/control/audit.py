"""Do the controller's books balance? Requests against totals and queue, workers against what their
requests have booked.

Called by `Controller.check`, after every event in simulation.
"""

from collections.abc import Mapping

from penstock.control.fleet import Fleet
from penstock.control.queue import FairQueue
from penstock.control.record import RequestRecord, WorkerRecord
from penstock.core.request import RequestState
from penstock.core.types import RequestId


def audit(
    totals: Mapping[str, int],
    requests: Mapping[RequestId, RequestRecord],
    queue: FairQueue,
    fleet: Fleet,
) -> None:
    """Assert that all books balance. O(requests x workers)."""
    ended = totals["finished"] + totals["aborted"] + totals["failed"]
    assert totals["arrived"] == ended + len(requests), (totals, len(requests))
    fleet.check()
    queue.check()
    for record in requests.values():
        is_queued = record.state is RequestState.QUEUED
        assert is_queued == (record.request_id in queue), record.request_id
        assert is_queued == (record.booking is None), record.request_id
    bookings = [r.booking for r in requests.values() if r.booking is not None and not r.been]
    landing = sum(b.arriving_tokens for b in bookings if not b.is_prefilling)
    assert fleet.landing_tokens == landing, (fleet.landing_tokens, landing)
    for worker in fleet:
        _check_books(worker, [r for r in requests.values() if worker in r.holders])


def _check_books(worker: WorkerRecord, records: list[RequestRecord]) -> None:
    """Assert that a worker's books are the sum of what its requests have booked."""
    bookings = [r.booking for r in records if r.booking is not None and r.decode is worker]
    prefills = [r for r in records if r.prefill is worker and r.booking and r.booking.is_prefilling]
    sums = (
        len(records),
        len(prefills),
        sum(r.request.num_tokens for r in prefills),
        len(bookings),
        sum(b.decode_tokens for b in bookings),
        sum(b.kv_tokens for b in bookings),
        sum(r.num_tokens for r in records if r.decode is worker),
        sum(b.context_tokens for b in bookings),
    )
    books = (
        worker.num_requests,
        worker.num_prefills,
        worker.prefill_tokens,
        worker.num_decodes,
        worker.decode_tokens,
        worker.kv_tokens,
        worker.held_tokens,
        worker.context_tokens,
    )
    assert books == sums, (worker.info.worker_id, books, sums)
    expected_ns = sum(r.booking.prefill_ns for r in prefills if r.booking)
    assert abs(worker.backlog_ns - expected_ns) <= 1e-6 * expected_ns + 1.0
