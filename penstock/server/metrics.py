"""What the server counts, and how Prometheus reads it.

Owns counters and histograms of one application: plain integers, so that counting a token costs
well under a microsecond; they become metric families when scraped. Base names are vLLM's where the
meaning is the same. Gauges of workers are read from the service at the scrape. `generation.py`
counts, `app.py` scrapes.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import PenstockError
from penstock.core.explain import Accuracy
from penstock.core.messages import Load
from penstock.core.request import Timeline
from penstock.core.service import ClusterStatus, WorkerStatus
from penstock.core.types import NS_PER_S
from penstock.server.choice import Choice
from penstock.server.errors import error_kind
from penstock.server.tier_metrics import TIER_HELP, tier_totals

REGIMES = ("normal", "imbalanced", "overloaded")
_STEPS = (1.0, 2.5, 5.0)
SECONDS = tuple(step * 10.0**power for power in range(-4, 3) for step in _STEPS)
TOKEN_SECONDS = tuple(step * 10.0**power for power in range(-5, 1) for step in _STEPS)
TOKENS = tuple(step * 10.0**power for power in range(6) for step in (1.0, 2.0, 5.0))
BYTES_PER_SECOND = tuple(step * 10.0**power for power in range(6, 12) for step in _STEPS)
SPANS = tuple(float(2**power) for power in range(14))


Series = dict[tuple[str, ...], float]
"""Values by the labels that come behind `model_name`."""
Value = TypeVar("Value")


class Histogram:
    """Counts by bucket; `bounds[i]` is the largest value of bucket i, the last one has no bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Return (bound, values up to it), as Prometheus wants it."""
        names = [*map(repr, self.bounds), "+Inf"]
        running, result = 0, []
        for name, count in zip(names, self.counts, strict=True):
            running += count
            result.append((name, float(running)))
        return result


class Histograms(dict[str, Histogram]):
    """Histograms of one kind by a label, made when the label is first seen."""

    def __init__(self, bounds: Sequence[float]) -> None:
        super().__init__()
        self._bounds = bounds

    def __missing__(self, label: str) -> Histogram:
        made = self[label] = Histogram(self._bounds)
        return made


class Metrics(Collector):
    """Everything one application counts, with a registry of its own."""

    def __init__(
        self,
        model_name: str,
        status: Callable[[], ClusterStatus],
        accuracy: Callable[[], Accuracy] = Accuracy,
    ) -> None:
        self._status = status
        self._accuracy = accuracy
        self._labels = {"model_name": model_name}
        self._histograms = {
            "time_to_first_token_seconds": Histogram(SECONDS),
            "inter_token_latency_seconds": Histogram(TOKEN_SECONDS),
            "request_time_per_output_token_seconds": Histogram(TOKEN_SECONDS),
            "e2e_request_latency_seconds": Histogram(SECONDS),
            "request_queue_time_seconds": Histogram(SECONDS),
            "request_prefill_time_seconds": Histogram(SECONDS),
            "request_prompt_tokens": Histogram(TOKENS),
            "request_generation_tokens": Histogram(TOKENS),
            "handoff_spans": Histogram(SPANS),
        }
        self._handoff_seconds = Histograms(SECONDS)
        self._handoff_rates = Histograms(BYTES_PER_SECOND)
        self._handoff_bytes: defaultdict[str, int] = defaultdict(int)
        self._handoff_verified: defaultdict[str, int] = defaultdict(int)
        self._ttft_parts = Histograms(SECONDS)
        self._finished: defaultdict[str, int] = defaultdict(int)
        self._failed: defaultdict[str, int] = defaultdict(int)
        self._between_tokens = self._histograms["inter_token_latency_seconds"]
        self._prompt_tokens = self._generated_tokens = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # ------------------------------------------------------------------------------------ counting

    def count_first(self, choice: Choice, num_tokens: int) -> None:
        """Count a prompt whose first output came, with that output's tokens."""
        self._prompt_tokens += len(choice.request.prompt_token_ids)
        self._generated_tokens += num_tokens

    def count_tokens(self, num_tokens: int, seconds: float) -> None:
        """Count tokens that came `seconds` after the ones before."""
        self._generated_tokens += num_tokens
        self._between_tokens.observe(seconds / num_tokens, num_tokens)

    def count_failure(self, error: PenstockError) -> None:
        """Count a response that is an error or ends in one."""
        self._failed[error_kind(error).code] += 1

    def observe(self, choice: Choice, has_failed: bool) -> None:
        """Count a choice that will get no more tokens."""
        if not has_failed:
            self._finished[choice.finish_reason or "abort"] += 1
        if not choice.first_ns:
            return
        seen, arrived_ns = self._histograms, choice.request.arrived_ns
        delivered_ns = choice.delivered_ns or choice.first_ns
        seen["time_to_first_token_seconds"].observe((delivered_ns - arrived_ns) / NS_PER_S)
        seen["e2e_request_latency_seconds"].observe((choice.last_ns - arrived_ns) / NS_PER_S)
        seen["request_prompt_tokens"].observe(len(choice.request.prompt_token_ids))
        seen["request_generation_tokens"].observe(choice.num_tokens)
        if choice.num_tokens > 1:
            seen["request_time_per_output_token_seconds"].observe(
                (choice.last_ns - choice.first_ns) / NS_PER_S / (choice.num_tokens - 1)
            )
        if choice.timeline is not None:
            self._observe_timeline(choice.timeline, delivered_ns)

    def _observe_timeline(self, timeline: Timeline, delivered_ns: int) -> None:
        parts = timeline.ledger(delivered_ns)
        self._histograms["request_queue_time_seconds"].observe(parts["queue"])
        self._histograms["request_prefill_time_seconds"].observe(parts["prefill"])
        for part, seconds in parts.items():
            if part != "ttft":
                self._ttft_parts[part].observe(seconds)
        # What was all in the prefix cache of the decode worker was not moved.
        if timeline.pulled_ns and timeline.pull_bytes:
            self._observe_handoff(timeline)

    def _observe_handoff(self, timeline: Timeline) -> None:
        transport = timeline.transport
        seconds = (timeline.pulled_ns - timeline.reserved_ns) / NS_PER_S
        self._handoff_seconds[transport].observe(seconds)
        self._handoff_bytes[transport] += timeline.pull_bytes
        self._handoff_verified[transport] += timeline.pull_verified
        self._histograms["handoff_spans"].observe(timeline.pull_spans)
        if timeline.pull_copy_ns > 0:
            self._handoff_rates[transport].observe(timeline.pull_bytes_per_s)

    # ------------------------------------------------------------------------------------- scraping

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the text for a scraper that accepts `accept`, and its content type."""
        encode, content_type = exposition.choose_encoder(accept)
        return encode(self.registry), content_type

    def collect(self) -> Iterable[Metric]:
        """Yield every metric family as of now."""
        yield from self._collect_counters()
        for name, histogram in self._histograms.items():
            yield self._histogram(name, {(): histogram}, ())
        yield self._histogram("handoff_seconds", _keyed(self._handoff_seconds), ("transport",))
        yield self._histogram(
            "handoff_bytes_per_second", _keyed(self._handoff_rates), ("transport",)
        )
        yield self._histogram("ttft_part_seconds", _keyed(self._ttft_parts), ("part",))
        yield from self._collect_cluster(self._status())

    def _collect_counters(self) -> Iterator[Metric]:
        yield self._counter("prompt_tokens", {(): self._prompt_tokens})
        yield self._counter("generation_tokens", {(): self._generated_tokens})
        finished: Series = {(reason,): count for reason, count in self._finished.items()}
        yield self._counter("request_success", finished, ("finished_reason",))
        failed: Series = {(code,): count for code, count in self._failed.items()}
        yield self._counter("request_failure", failed, ("code",))
        yield self._counter("handoff_bytes", _keyed(self._handoff_bytes), ("transport",))
        yield self._counter("handoff_verified", _keyed(self._handoff_verified), ("transport",))

    def _collect_cluster(self, status: ClusterStatus) -> Iterator[Metric]:
        running = status.prefilling + status.handing_off + status.decoding
        yield self._gauge("num_requests_running", {(): running})
        yield self._gauge("num_requests_waiting", {(): status.queued})
        yield self._counter("request_retries", {(): status.retried})
        yield from self._collect_scheduling(status)
        yield from self._collect_predictions(self._accuracy())
        yield from self._collect_workers([w for w in status.workers if w.load is not None])

    def _collect_scheduling(self, status: ClusterStatus) -> Iterator[Metric]:
        regimes: Series = {(name,): name == status.regime for name in REGIMES}
        yield self._gauge("regime", regimes, ("regime",))
        loads: Series = {("prefill",): status.load_prefill, ("decode",): status.load_decode}
        yield self._gauge("load", loads, ("side",))
        yield self._counter("role_flips", {(): status.flips})
        yield self._gauge("wanted_workers", {(): status.wanted_workers})
        if status.limits.most:
            yield self._counter("workers_started", {(): status.limits.started})
            yield self._counter("workers_retired", {(): status.limits.retired})
        for name, field in _WORKER_PREDICTIONS.items():
            series: Series = {_named_by_role(w): getattr(w, field) for w in status.workers}
            if name.endswith("_seconds"):
                series = {key: ms / 1000 for key, ms in series.items()}
            yield self._gauge(name, series, ("worker", "role"))

    def _collect_predictions(self, accuracy: Accuracy) -> Iterator[Metric]:
        for of in ("ttft", "tpot"):
            for name in ("count", "predicted_s", "actual_s", "relative_error"):
                total: Series = {(): getattr(accuracy, f"{of}_{name}")}
                words = name.removesuffix("_s") + "_seconds" * name.endswith("_s")
                yield self._counter(f"{of}_prediction_{words}", total)
        yield self._gauge("step_prediction_error", {(): accuracy.step_error})
        yield self._gauge("transfer_prediction_error", {(): accuracy.transfer_error})

    def _collect_workers(self, workers: Sequence[WorkerStatus]) -> Iterator[Metric]:
        names = ("worker", "role")
        loads = {_named_by_role(w): w.load for w in workers if w.load}
        infos = {_named_by_role(w): w.info for w in workers}
        usage: Series = {key: kv_cache_usage(infos[key], load) for key, load in loads.items()}
        yield self._gauge("kv_cache_usage_perc", usage, names)
        scattered: Series = {
            (*key, str(group)): share
            for key, load in loads.items()
            for group, share in enumerate(load.fragmentation)
        }
        yield self._gauge("kv_fragmentation", scattered, (*names, "group"))
        for name, field in _WORKER_TOTALS.items():
            totals: Series = {key: getattr(load, field) for key, load in loads.items()}
            yield self._counter(name, totals, names)
        yield from self._collect_tiers(loads)

    def _collect_tiers(self, loads: Mapping[tuple[str, str], Load]) -> Iterator[Metric]:
        names = ("worker", "role", "tier")
        tiers = {(*key, tier.name): tier for key, load in loads.items() for tier in load.tiers}
        if not tiers:
            return
        usage: Series = {key: tier.num_used / tier.num_slots for key, tier in tiers.items()}
        yield self._gauge("kv_tier_usage_perc", usage, names)
        for name, labels, totals in tier_totals(tiers, loads):
            yield self._counter(name, totals, ("worker", "role", labels))

    # --------------------------------------------------------------------------------------- forms

    def _histogram(
        self, name: str, series: Mapping[tuple[str, ...], Histogram], labels: tuple[str, ...]
    ) -> Metric:
        family = HistogramMetricFamily(*_named(name), labels=self._names(labels))
        for values, histogram in series.items():
            family.add_metric(self._values(values), histogram.buckets(), histogram.total)
        return family

    def _counter(
        self,
        name: str,
        series: Series,
        labels: tuple[str, ...] = (),
    ) -> Metric:
        family = CounterMetricFamily(*_named(name), labels=self._names(labels))
        for values, value in series.items():
            family.add_metric(self._values(values), value)
        return family

    def _gauge(
        self,
        name: str,
        series: Series,
        labels: tuple[str, ...] = (),
    ) -> Metric:
        family = GaugeMetricFamily(*_named(name), labels=self._names(labels))
        for values, value in series.items():
            family.add_metric(self._values(values), value)
        return family

    def _names(self, labels: tuple[str, ...]) -> list[str]:
        return [*self._labels, *labels]

    def _values(self, values: tuple[str, ...]) -> list[str]:
        return [*self._labels.values(), *values]


def kv_cache_usage(info: WorkerInfo, load: Load) -> float:
    """Return the share of a worker's KV blocks that requests hold, of its fullest group: 0 to 1."""
    groups = zip(info.num_blocks, load.free_blocks, load.cached_blocks, strict=True)
    return max((1.0 - (free + cached) / total for total, free, cached in groups), default=0.0)


def _named_by_role(worker: WorkerStatus) -> tuple[str, str]:
    """Return the labels of a worker: its name, and the role that it has now."""
    return worker.info.worker_id, (worker.role or worker.info.role).value


def _keyed(series: Mapping[str, Value]) -> dict[tuple[str, ...], Value]:
    """Return what is known by one label in the form of those that have several."""
    return {(label,): value for label, value in series.items()}


def _named(name: str) -> tuple[str, str]:
    return f"penstock:{name}", _HELP[name]


_WORKER_TOTALS = {
    "prefix_cache_queries": "prefix_queries",
    "prefix_cache_hits": "prefix_hits",
    "num_preemptions": "preemptions",
    "handoff_corrupt": "pulls_corrupt",
    "handoff_recomputed": "pulls_recomputed",
    "handoff_expired": "leases_expired",
}
"""Totals of a worker, by the field of `Load` that has them."""

_WORKER_PREDICTIONS = {
    "worker_backlog_seconds": "backlog_ms",
    "worker_step_seconds": "step_ms",
    "worker_decodes": "num_decodes",
}
"""What is expected of a worker, by the field of `WorkerStatus` that has it."""

_HELP = {
    "regime": "1 for the regime the cluster is in: normal, imbalanced or overloaded.",
    "load": "Load of a side of the cluster over what its SLO allows, 1 is full.",
    "role_flips": "Workers that changed sides by themselves.",
    "wanted_workers": "Workers that would bring both sides to a load of 0.8.",
    "workers_started": "Workers that were started because the load asked for them.",
    "workers_retired": "Workers that were retired because they had little to do.",
    "worker_backlog_seconds": "Predicted time of the prefills that a worker has ahead.",
    "worker_step_seconds": "Predicted time of a worker's decode step with one sequence more.",
    "worker_decodes": "Sequences that decode on a worker, or are to.",
    "ttft_prediction_count": "First tokens whose time was predicted; divide the next three by it.",
    "ttft_prediction_predicted_seconds": "Sum of predicted times to first token.",
    "ttft_prediction_actual_seconds": "Sum of the same requests' actual times to first token.",
    "ttft_prediction_relative_error": "Sum of |predicted - actual| over the larger of the two.",
    "tpot_prediction_count": "Finished requests whose time per token was predicted.",
    "tpot_prediction_predicted_seconds": "Sum of predicted times per token.",
    "tpot_prediction_actual_seconds": "Sum of the same requests' actual times per token.",
    "tpot_prediction_relative_error": "Sum of |predicted - actual| over the larger of the two.",
    "step_prediction_error": "Mean of late of |log(actual / predicted)| of steps.",
    "transfer_prediction_error": "Mean of late of |log(actual / predicted)| of transfers.",
    "prompt_tokens": "Prompt tokens of requests that got a first token.",
    "generation_tokens": "Tokens generated.",
    "request_success": "Requests that ended without an error, by reason.",
    "request_failure": "Responses that are an error or end in one, by error code.",
    "request_retries": "Requests that went on with another worker.",
    "time_to_first_token_seconds": "From arrival to the first token leaving for the client.",
    "inter_token_latency_seconds": "Between two tokens of one request.",
    "request_time_per_output_token_seconds": "Mean time per token of a request after its first.",
    "e2e_request_latency_seconds": "From arrival to the last token.",
    "request_queue_time_seconds": "From arrival to the start of prefill.",
    "request_prefill_time_seconds": "From the start of prefill to its end.",
    "request_prompt_tokens": "Prompt tokens per request.",
    "request_generation_tokens": "Generated tokens per request.",
    "ttft_part_seconds": "Parts that add up to the time to first token.",
    "handoff_seconds": "Time of pulling and verifying one request's KV.",
    "handoff_bytes": "Bytes pulled from prefill workers, by the transport really used.",
    "handoff_bytes_per_second": "Rate at which one request's KV was copied, in all its parts.",
    "handoff_spans": "Copies it took to pull one request's KV; 1 is one piece.",
    "handoff_verified": "Requests whose pulled KV was compared with the digests of its offer.",
    "handoff_corrupt": "Pulls whose content was not what was offered; they were pulled again.",
    "handoff_recomputed": "Requests whose KV could not be pulled and was computed again.",
    "handoff_expired": "Offers that nobody claimed within their lease.",
    "kv_fragmentation": "Share of writable KV blocks outside their longest run, 0 is one piece.",
    "num_requests_running": "Requests that workers have.",
    "num_requests_waiting": "Requests waiting for a worker.",
    "kv_cache_usage_perc": "Share of KV blocks held by requests, 1 is full.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "num_preemptions": "Requests preempted for want of KV blocks.",
    **TIER_HELP,
}
