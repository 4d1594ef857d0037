"""Choose the workers of a request: a prefill and a decode worker, or one that does both.

Pure functions over `WorkerRecord`s. The rule is the least work already assigned, in tokens; ties go
to the worker that joined first. One worker serves alone when there is no prefill to hand off (a
prompt of one token), when the cluster has workers of both roles and the mixed one is less busy, or
when one of the two roles has nobody left.
"""

from collections.abc import Iterable

from penstock.control.record import WorkerRecord
from penstock.core.types import Role, WorkerId


def choose(workers: Iterable[WorkerRecord], num_tokens: int) -> tuple[WorkerId, WorkerId] | None:
    """Return (prefill worker, decode worker), equal when one serves alone, or None when nobody is
    up.

    `num_tokens` counts prompt and output so far. O(workers).
    """
    by_role: dict[Role, list[WorkerRecord]] = {role: [] for role in Role}
    for worker in workers:
        by_role[worker.info.role].append(worker)
    mixed = min(by_role[Role.MIXED], key=_busy_tokens, default=None)
    prefill = min(by_role[Role.PREFILL], key=_prefill_tokens, default=None)
    decode = min(by_role[Role.DECODE], key=_decode_tokens, default=None)
    if prefill is None or decode is None:
        # A role is a label: with one of the two gone, whoever is left does both.
        alone = mixed or prefill or decode
        return (alone.info.worker_id, alone.info.worker_id) if alone else None
    if mixed is not None and _busy_tokens(mixed) < _prefill_tokens(prefill):
        return mixed.info.worker_id, mixed.info.worker_id
    if num_tokens == 1:
        return decode.info.worker_id, decode.info.worker_id
    return prefill.info.worker_id, decode.info.worker_id


def _prefill_tokens(worker: WorkerRecord) -> int:
    return worker.prefill_tokens


def _decode_tokens(worker: WorkerRecord) -> int:
    return worker.decode_tokens


def _busy_tokens(worker: WorkerRecord) -> int:
    return worker.prefill_tokens + worker.decode_tokens
