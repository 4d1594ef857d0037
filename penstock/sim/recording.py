"""`Recording` of a real run, read from the controller's decision log, so that it can be simulated
again with one thing changed.

The log has every request with its tokens, every worker with its memory, when the client got what,
and samples of what steps and pulls took. From these come the arrivals, the cluster, and step times
and links fitted to this very run. Between two steps a real worker also decides and sends, which
no sample of a step contains; the gaps between its messages do, and count as a pause of every step.

Called by `penstock/cli/replay.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.core.config import ControllerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import BadRequest
from penstock.core.events import Configured, Event
from penstock.core.messages import Cancel, Hello, Load, RequestFailed, Submit, TokenOutput, Tokens
from penstock.core.node import LogEntry
from penstock.core.request import Request
from penstock.core.step import PullSample, StepSample
from penstock.core.types import NS_PER_MS, NS_PER_S, RequestId, WorkerId
from penstock.sim.fabric import FabricCost
from penstock.sim.fleet import Member
from penstock.sim.observe import Served
from penstock.sim.profile import Hardware, StepTimes
from penstock.sim.workload import Arrival, Piece

Rows = npt.NDArray[np.float64]
_Sample = TypeVar("_Sample")
_SAMPLES_MIN: Final = 8
_WINDOW: Final = 16
_GAP_MAX_NS: Final = 10 * NS_PER_S
_STALL: Final = 5.0
_ROUNDS: Final = 6


@dataclass(frozen=True, slots=True)
class DecodeGap:
    """Time between two messages of a worker that both carried one token of the same requests."""

    batch: int
    context_tokens: int
    gap_ns: int


@dataclass(slots=True)
class Recording:
    """What a log says: requests in order of arrival, as their clients saw them, the workers, and
    what the controller was started with.
    """

    config: ControllerConfig = field(default_factory=ControllerConfig)
    requests: list[tuple[Request, Served]] = field(default_factory=list)
    submitted_ns: dict[RequestId, int] = field(default_factory=dict)
    """When the controller was given them, after the server had read, checked and tokenised."""
    tokens_ns: dict[RequestId, list[int]] = field(default_factory=dict)
    """When the controller was given each of a request's tokens."""
    workers: dict[WorkerId, WorkerInfo] = field(default_factory=dict)
    steps: dict[WorkerId, list[StepSample]] = field(default_factory=dict)
    pulls: list[PullSample] = field(default_factory=list)
    gaps: dict[WorkerId, list[DecodeGap]] = field(default_factory=dict)
    messages_ns: list[int] = field(default_factory=list)

    @property
    def served(self) -> list[Served]:
        """The requests as their clients saw them."""
        return [served for _, served in self.requests]

    def arrivals(self) -> list[Arrival]:
        """Return the requests that got tokens, each to end with as many as it got."""
        start_ns = self.requests[0][1].arrived_ns
        return [
            Arrival(
                served.arrived_ns - start_ns,
                _pieces((*request.prompt_token_ids, *request.output_token_ids)),
                served.num_tokens,
            )
            for request, served in self.requests
            if served.num_tokens
        ]

    def members(self) -> tuple[Member, ...]:
        """Return the workers with the step times of this run.

        Raises: `BadRequest` when the log has too few steps to go by.
        """
        return tuple(
            Member(str(name), info.role, self._hardware(name, info), host=0)
            for name, info in self.workers.items()
        )

    def _hardware(self, name: WorkerId, info: WorkerInfo) -> Hardware:
        """What a worker did too seldom to tell is taken from all of them."""
        steps = self.steps.get(name, [])
        all_steps = [sample for samples in self.steps.values() for sample in samples]
        all_gaps = [gap for gaps in self.gaps.values() for gap in gaps]
        times = fit_step_times(
            _enough(_prefills(steps), _prefills(all_steps)),
            _enough(_decodes(steps), _decodes(all_steps)),
            _enough(self.gaps.get(name, []), all_gaps),
        )
        model, capacity_tokens = info.layout.model, info.capacity_tokens
        return Hardware("recorded", model, 1, capacity_tokens, times, info.num_blocks)

    def fabric(self) -> FabricCost:
        """Return links as fast as the pulls of this run were; the usual ones without any."""
        if len(self.pulls) < _SAMPLES_MIN:
            return FabricCost()
        rows = np.array([(1.0, p.num_spans, p.num_bytes) for p in self.pulls])
        fixed_ns, span_ns, byte_ns = fit(rows, np.array([p.duration_ns for p in self.pulls]))
        bytes_per_s = NS_PER_S / max(byte_ns, 1e-4)
        return FabricCost(
            latency_ns=int(max(fixed_ns, 1_000)),
            span_ns=int(span_ns),
            inner_bytes_per_s=bytes_per_s,
            card_bytes_per_s=bytes_per_s,
        )


def read_recording(path: str) -> Recording:
    """Read the decision log of a controller.

    Raises: `BadRequest` when it is none, or nobody was served in it.
    """
    recording = _Reader().read(_events(path))
    if not recording.workers or not any(served.num_tokens for served in recording.served):
        raise BadRequest(
            f"{path} has no request that was served: it must be the file named by --decision-log "
            "itself (the controller's), not one of the workers' beside it"
        )
    return recording


def _events(path: str) -> Iterator[tuple[int, Event]]:
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    entry = msgspec.json.decode(line, type=LogEntry)
                    event: Event = msgspec.convert(entry.event, Event, str_keys=True)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    if not line.endswith(b"\n"):
                        return  # the process was killed while it wrote its last line
                    raise BadRequest(f"{path}:{number} is no decision: {error}") from error
                yield entry.now_ns, event
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Goes through a log once."""

    def __init__(self) -> None:
        self._recording = Recording()
        self._open: dict[str, tuple[Request, Served]] = {}
        self._last: dict[WorkerId, tuple[int, dict[str, int]]] = {}

    def read(self, events: Iterable[tuple[int, Event]]) -> Recording:
        recording = self._recording
        for now_ns, event in events:
            match event:
                case Submit(request=request):
                    served = Served(
                        request.arrived_ns or now_ns, request.num_tokens, request.params.max_tokens
                    )
                    self._open[request.request_id] = request, served
                    recording.submitted_ns[request.request_id] = now_ns
                    recording.requests.append((request, served))
                case Configured(config=config):
                    recording.config = config
                case Hello(info=info):
                    recording.workers.setdefault(info.worker_id, info)
                case Load(worker_id=name, step_samples=steps, pull_samples=pulls):
                    recording.steps.setdefault(name, []).extend(steps)
                    recording.pulls += pulls
                case Tokens(worker_id=name, outputs=outputs):
                    self._take(name, outputs, now_ns)
                case Cancel(request_id=request_id) | RequestFailed(request_id=request_id):
                    if request_id in self._open and isinstance(event, RequestFailed):
                        self._open[request_id][1].error = event.reason
                    self._open.pop(request_id, None)
                case _:
                    pass
        recording.requests.sort(key=lambda pair: pair[1].arrived_ns)
        return recording

    def _take(self, name: WorkerId, outputs: Sequence[TokenOutput], now_ns: int) -> None:
        contexts: dict[str, int] = {}
        is_plain = True
        for output in outputs:
            own_id = output.request_id.split("~")[0]  # a later attempt has its number behind this
            if own_id not in self._open:
                is_plain = False
                continue
            request, served = self._open[own_id]
            served.take(len(output.token_ids), output.timeline, now_ns)
            stamps = self._recording.tokens_ns.setdefault(request.request_id, [])
            stamps += [now_ns] * len(output.token_ids)
            is_plain = is_plain and len(output.token_ids) == 1
            contexts[own_id] = request.num_tokens + served.num_tokens - 1
            if output.finish_reason is not None:
                served.finished_ns = now_ns
                del self._open[own_id]
        before = self._last.get(name)
        if is_plain and before is not None and before[1].keys() == contexts.keys():
            gap_ns = now_ns - before[0]
            if gap_ns < _GAP_MAX_NS:
                gap = DecodeGap(len(contexts), sum(contexts.values()), gap_ns)
                self._recording.gaps.setdefault(name, []).append(gap)
        self._last[name] = now_ns, contexts


def fit_step_times(
    prefills: Sequence[StepSample], decodes: Sequence[StepSample], gaps: Sequence[DecodeGap]
) -> StepTimes:
    """Return the coefficients that fit these best; a step includes the pause before the next.

    Raises: `BadRequest` when there are too few.
    """
    if len(gaps) < _WINDOW or len(decodes) < _SAMPLES_MIN or not prefills:
        raise BadRequest(
            f"the log has {len(gaps)} pauses between decode steps, {len(decodes)} decode steps and "
            f"{len(prefills)} prefills to learn step times from; it takes {_WINDOW}, "
            f"{_SAMPLES_MIN} and 1: record a longer run"
        )
    d, e, f = fit(
        np.array([(1.0, s.decodes, s.context_tokens) for s in decodes]),
        np.array([float(s.duration_ns) for s in decodes]),
    )
    a, b, c = fit(
        np.array([(1.0, s.prefill_tokens, s.prefill_work) for s in prefills]),
        np.array([float(s.duration_ns) for s in prefills]),
    )
    pause_ns = _pause_ns(gaps, (d, e, f))
    fitted = (a + pause_ns, b, c, d + pause_ns, e, f)
    return StepTimes(*(value / NS_PER_MS for value in fitted))


def _pause_ns(gaps: Sequence[DecodeGap], coefficients: tuple[float, float, float]) -> float:
    """Return how much longer than a step it takes from message to message.

    Messages may reach the controller in clumps: the mean over a few in a row does not mind, and the
    median over many such means does not mind a stall.
    """
    rows = np.array([(1.0, gap.batch, gap.context_tokens) for gap in gaps])
    pauses = np.array([float(gap.gap_ns) for gap in gaps]) - rows @ np.array(coefficients)
    num_windows = len(gaps) // _WINDOW
    means = pauses[: num_windows * _WINDOW].reshape(num_windows, _WINDOW).mean(axis=1)
    return max(float(np.median(means)), 0.0)


def fit(rows: Rows, durations: Rows) -> list[float]:
    """Return coefficients of at least 0 that fit durations with the least relative error.

    Least squares, each duration weighed by what is predicted for it: weighed by itself, a short
    one would count more than a long one and the prediction would come out too short. What took
    several times as long as predicted is a machine busy with something else, and left out.
    """
    weights = np.full(len(rows), 1 / float(np.median(durations)))
    coefficients = np.zeros(rows.shape[1])
    kept = np.ones(len(rows), dtype=bool)
    for _ in range(_ROUNDS):
        coefficients = _non_negative(rows[kept], durations[kept], weights[kept])
        predicted = np.maximum(rows @ coefficients, 1.0)
        weights = 1 / predicted
        kept = durations < _STALL * predicted
        if kept.sum() < rows.shape[1]:
            break
    return [float(value) for value in coefficients]


def _non_negative(rows: Rows, durations: Rows, weights: Rows) -> Rows:
    """Solve least squares; columns that come out negative are left out, the worst first."""
    used = list(range(rows.shape[1]))
    weighted = rows * weights[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-30)
    coefficients = np.zeros(rows.shape[1])
    while used:
        scaled = weighted[:, used] / scale[used]
        solved = np.linalg.lstsq(scaled, durations * weights, rcond=None)[0]
        if (solved >= 0).all():
            coefficients[used] = solved / scale[used]
            break
        used.pop(int(np.argmin(solved)))
    return coefficients


def _prefills(steps: list[StepSample]) -> list[StepSample]:
    return [step for step in steps if step.prefill_tokens and not step.decodes]


def _decodes(steps: list[StepSample]) -> list[StepSample]:
    return [step for step in steps if step.decodes and not step.prefill_tokens]


def _enough(own: list[_Sample], everybody: list[_Sample]) -> list[_Sample]:
    return own if len(own) >= _SAMPLES_MIN else everybody


def _pieces(token_ids: Sequence[int]) -> tuple[Piece, ...]:
    return tuple((token_id, 1) for token_id in token_ids)
