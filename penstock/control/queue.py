"""`FairQueue`: the requests that wait at the controller, in the order in which they may go.

Priority first (a lower number is more urgent, as in vLLM). Within a priority the keys share: a
request is tagged with the virtual time at which its key would begin it, were all keys served at
the same rate in tokens; who asks much has later tags, who asks now and then is not behind them. A
single key is served first come, first served.

Source: start-time fair queueing, Goyal, Vin and Cheng (SIGCOMM 96).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Final

from penstock.control.record import RequestRecord
from penstock.core.types import RequestId

KEYS_MAX: Final = 4096
"""Keys whose share is remembered while they have nothing queued."""


@dataclass(order=True, slots=True)
class _Entry:
    priority: int
    start: float
    number: int
    record: RequestRecord = field(compare=False)


class FairQueue:
    """Waiting requests. `num_tokens` is the sum over them of prompt and output so far."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._entries: dict[RequestId, _Entry] = {}
        self._heap: list[_Entry] = []
        self._finish: dict[str, float] = {}
        self._virtual = 0.0
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[RequestRecord]:
        """In order of coming."""
        return (entry.record for entry in self._entries.values())

    def add(self, record: RequestRecord) -> None:
        """Let a request wait. O(log n)."""
        assert record.request_id not in self._entries, record.request_id
        key = record.request.fairness_key
        start = max(self._virtual, self._finish.get(key, 0.0))
        self._finish[key] = start + record.num_tokens
        self._num_added += 1
        entry = _Entry(record.request.priority, start, self._num_added, record)
        self._entries[record.request_id] = entry
        self.num_tokens += record.num_tokens
        heappush(self._heap, entry)
        self._forget_keys()

    def first(self) -> RequestRecord | None:
        """Return whose turn it is."""
        heap = self._heap
        while heap and self._entries.get(heap[0].record.request_id) is not heap[0]:
            heappop(heap)
        return heap[0].record if heap else None

    def take(self, record: RequestRecord) -> None:
        """Take a request out because it goes on: its key has had its turn."""
        entry = self._entries[record.request_id]
        self._virtual = max(self._virtual, entry.start)
        self.discard(record)

    def discard(self, record: RequestRecord) -> None:
        """Take a request out, if it is there."""
        entry = self._entries.pop(record.request_id, None)
        if entry is None:
            return
        self.num_tokens -= record.num_tokens
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def last(self) -> RequestRecord | None:
        """Return the one to give up first: least urgent, then the last of its priority. O(n)."""
        entry = max(self._entries.values(), default=None)
        return None if entry is None else entry.record

    def tokens_before(self, priority: int) -> int:
        """Return the tokens of those that go before a new request of this priority. O(n)."""
        if not self._entries:
            return 0
        entries = self._entries.values()
        return sum(e.record.num_tokens for e in entries if e.priority <= priority)

    def _forget_keys(self) -> None:
        if len(self._finish) > KEYS_MAX + len(self._entries):
            now = self._virtual
            self._finish = {key: end for key, end in self._finish.items() if end > now}

    def check(self) -> None:
        """Assert that the sum is right and that every request is found."""
        assert self.num_tokens == sum(e.record.num_tokens for e in self._entries.values())
        known = {id(entry) for entry in self._heap}
        assert all(id(entry) in known for entry in self._entries.values())
