"""What things will take: a step of a worker, a transfer between two. Pure formulas and what feeds
them.

    prefill   a + b * S + c * (S^2 + 2 * S * P)       S new tokens behind P that are there already
    decode    d + e * batch + f * context_tokens
    transfer  T0 + R * alpha + bytes / bandwidth       R spans

A step that does both costs both, but reads the weights once: d stands for a then. Each worker's
coefficients start from its profile and follow the steps that it reports (`control/fit.py`), so
hardware may be mixed without anybody saying so; each pair of workers has a transfer of its own
as soon as it has reported a few.

Source: FlowKV's and Splitwise's step models; the transfer's is FlowKV's table (2 ms + 33 us a call
+ bytes at the link's rate), fitted.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from penstock.control.fit import Fit, Float64
from penstock.control.profiles import coefficients_ns
from penstock.core.step import PullSample, StepSample
from penstock.core.types import WorkerId

A, B, C, D, E, F = range(6)
"""Columns of a worker's coefficients, in ns (per token, per S^2 + 2SP, per sequence)."""

TRANSFER_PRIOR_NS: Final = (500_000.0, 33_000.0, 0.2)
"""T0, alpha and ns per byte of a pair that nobody has measured: 5 GB/s."""
NEARER: Final = 0.5
"""Of what a byte takes between hosts, what it is taken to need within one until that is known."""
PAIRS_MAX: Final = 4096
OWN_AFTER: Final = 4
"""Transfers of a pair after which its own fit is used instead of the usual one."""

ThreeNs = tuple[float, float, float]
"""T0, alpha and ns per byte."""
_NOBODY: Final[Mapping[WorkerId, ThreeNs]] = {}


def step_row(sample: StepSample) -> tuple[float, ...]:
    """Return what a step had of each coefficient."""
    has_decodes = sample.decodes > 0
    return (
        float(sample.prefill_tokens > 0 and not has_decodes),
        sample.prefill_tokens,
        sample.prefill_work,
        float(has_decodes),
        sample.decodes,
        sample.context_tokens,
    )


class WorkerCost:
    """The step times of one worker: its profile, corrected by what it reports."""

    __slots__ = ("fit",)

    def __init__(self, profile: str = "") -> None:
        self.fit = Fit(coefficients_ns(profile))

    def learn(self, samples: tuple[StepSample, ...]) -> Float64:
        """Take in steps that were run; return the coefficients from now on."""
        for sample in samples:
            self.fit.update(step_row(sample), sample.duration_ns)
        return self.fit.coefficients


class TransferCosts:
    """The transfer times between workers: per pair where there is something to go by, else those of
    all pairs within a host, or between hosts.
    """

    def __init__(self) -> None:
        self._within = Fit(TRANSFER_PRIOR_NS)
        self._between = Fit(TRANSFER_PRIOR_NS)
        self._hosts: dict[WorkerId, str] = {}
        self._pairs: OrderedDict[tuple[WorkerId, WorkerId], Fit] = OrderedDict()
        self._known: dict[WorkerId, dict[WorkerId, ThreeNs]] = {}
        self.within, self.between = self._usual()
        """T0, alpha and ns per byte of pairs that have none of their own."""

    @property
    def error(self) -> float:
        """The latest error of predicted transfers, mean of those within and between hosts."""
        fits = [fit for fit in (self._within, self._between) if fit.num_samples]
        return sum(fit.error for fit in fits) / max(len(fits), 1)

    def join(self, worker_id: WorkerId, host: str) -> None:
        """Note where a worker is."""
        self._hosts[worker_id] = host

    def forget(self, worker_id: WorkerId) -> None:
        """Drop what is known of a worker that is gone: its successor may be elsewhere."""
        self._hosts.pop(worker_id, None)
        for pair in [pair for pair in self._pairs if worker_id in pair]:
            del self._pairs[pair]
            self._drop(*pair)

    def learn(self, to: WorkerId, samples: tuple[PullSample, ...]) -> None:
        """Take in pulls that `to` has made. Keeps the `PAIRS_MAX` pairs heard of last."""
        for sample in samples:
            row = (1.0, sample.num_spans, sample.num_bytes)
            is_within = self._is_within(sample.source, to)
            usual = self._within if is_within else self._between
            if not usual.update(row, sample.duration_ns):
                continue
            pair = (sample.source, to)
            fit = self._pairs.get(pair)
            if fit is None:
                fit = self._pairs[pair] = Fit(usual.coefficients)
            self._pairs.move_to_end(pair)
            fit.update(row, sample.duration_ns)
            if fit.num_samples >= OWN_AFTER:
                self._known.setdefault(to, {})[sample.source] = _three(fit)
            if len(self._pairs) > PAIRS_MAX:
                forgotten, _ = self._pairs.popitem(last=False)
                self._drop(*forgotten)
        self.within, self.between = self._usual()

    def known_to(self, to: WorkerId) -> Mapping[WorkerId, ThreeNs]:
        """Return T0, alpha and ns per byte by source, of those that have their own."""
        return self._known.get(to, _NOBODY)

    def predict_ns(
        self, source: WorkerId, to: WorkerId, num_bytes: float, num_spans: float
    ) -> float:
        """Return the expected time of one transfer."""
        known = self.known_to(to).get(source)
        if known is None:
            known = self.within if self._is_within(source, to) else self.between
        fixed, per_span, per_byte = known
        return fixed + per_span * num_spans + per_byte * num_bytes

    def _usual(self) -> tuple[ThreeNs, ThreeNs]:
        """Return what is learnt within a host and between hosts; within one a part of the other
        while there is nothing else to go by.
        """
        between = fixed, per_span, per_byte = _three(self._between)
        if self._within.num_samples:
            return _three(self._within), between
        return (fixed, per_span, per_byte * NEARER), between

    def _is_within(self, source: WorkerId, to: WorkerId) -> bool:
        return self._hosts.get(source) == self._hosts.get(to)

    def _drop(self, source: WorkerId, to: WorkerId) -> None:
        known = self._known.get(to, {})
        known.pop(source, None)
        if not known:
            self._known.pop(to, None)


def _three(fit: Fit) -> ThreeNs:
    fixed, per_span, per_byte = fit.coefficients.tolist()
    return fixed, per_span, per_byte
