"""Counting, and what a scraper reads."""

import msgspec
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.errors import CapacityExceeded
from penstock.core.messages import Load
from penstock.core.tiers import TierLoad
from penstock.core.types import FinishReason, Role, WorkerId
from penstock.server.metrics import Histogram, Metrics, kv_cache_usage
from tests.server.asking import choice_of, output_of, query_of
from tests.server.double import ScriptedService, text_script, worker_info

LOAD = Load(
    worker_id=WorkerId("decode-0"),
    waiting=1,
    running=2,
    handing_off=3,
    free_blocks=(60,),
    cached_blocks=(15,),
    preemptions=4,
    prefix_queries=50,
    prefix_hits=20,
    pulls_corrupt=5,
    pulls_recomputed=6,
    leases_expired=7,
    fragmentation=(0.0, 0.75),
)


def _metrics(load: Load | None = LOAD) -> Metrics:
    service = ScriptedService(text_script("x"))
    service.load = load
    return Metrics("tiny", service.status)


def _samples(metrics: Metrics, accept: str = "") -> dict[tuple, float]:
    text, _ = metrics.exposition(accept)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def _value(metrics: Metrics, name: str, **labels) -> float:
    labels |= {"model_name": "tiny"}
    return _samples(metrics)[(f"penstock:{name}", *sorted(labels.items()))]


def _served(metrics: Metrics, text: str = "abc", tpot_ns: int = 2_000_000):
    """Count one request as a generation would: 10 ms to the first token, then one each 2 ms."""
    choice = choice_of(query_of())
    choice.take(output_of(choice, text, FinishReason.LENGTH))
    arrived = choice.request.arrived_ns
    choice.first_ns = arrived + 10_000_000
    metrics.count_first(choice, 1)
    metrics.count_tokens(len(text) - 1, tpot_ns * (len(text) - 1) / 1e9)
    choice.last_ns = choice.first_ns + tpot_ns * (len(text) - 1)
    stamps = {
        "prefill_started_ns": 1, "offered_ns": 3, "offer_received_ns": 4, "reserved_ns": 6,
        "pulled_ns": 8, "first_token_ns": 9,
    }  # fmt: skip
    for name, ms in stamps.items():
        setattr(choice.timeline, name, arrived + ms * 1_000_000)
    metrics.observe(choice, has_failed=False)


def test_histograms_count_up_to_their_bounds():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        histogram.observe(value)
    histogram.observe(2.0, 2)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 5.0), ("+Inf", 6.0)]
    assert histogram.total == 14.0


@pytest.mark.parametrize(
    "accept", ["", "text/plain", "application/openmetrics-text; version=1.0.0; charset=utf-8"]
)
def test_the_text_parses(accept):
    metrics = _metrics()
    _served(metrics)
    assert all(name.startswith("penstock:") for name, *_ in _samples(metrics))
    text, content_type = metrics.exposition(accept)
    assert content_type.split(";")[0] in ("text/plain", "application/openmetrics-text")
    assert text.endswith(b"\n")


def test_one_request_is_in_every_histogram():
    metrics = _metrics()
    _served(metrics)
    for name, expected in {
        "time_to_first_token_seconds": 0.010,
        "e2e_request_latency_seconds": 0.014,
        "request_time_per_output_token_seconds": 0.002,
        "request_queue_time_seconds": 0.001,
        "request_prefill_time_seconds": 0.002,
        "request_prompt_tokens": 2,
        "request_generation_tokens": 3,
        "handoff_spans": 2,
    }.items():
        assert _value(metrics, f"{name}_count") == 1, name
        assert _value(metrics, f"{name}_sum") == pytest.approx(expected), name
    assert _value(metrics, "inter_token_latency_seconds_count") == 2
    assert _value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.004)


def test_what_was_moved_is_told_by_the_transport_really_used():
    metrics = _metrics()
    _served(metrics)
    _served(metrics)
    shm = {"transport": "shm"}
    assert _value(metrics, "handoff_seconds_count", **shm) == 2
    assert _value(metrics, "handoff_seconds_sum", **shm) == pytest.approx(0.004)
    assert _value(metrics, "handoff_bytes_total", **shm) == 8192
    assert _value(metrics, "handoff_bytes_per_second_count", **shm) == 2
    assert _value(metrics, "handoff_bytes_per_second_sum", **shm) == pytest.approx(
        2 * 4096 / 0.0002
    )
    assert _value(metrics, "handoff_verified_total", **shm) == 0
    assert _value(metrics, "handoff_spans_sum") == 4


def test_what_was_in_the_cache_already_was_not_moved():
    metrics = _metrics()
    choice = choice_of(query_of())
    choice.take(output_of(choice, "a", FinishReason.LENGTH))
    choice.first_ns = choice.last_ns = choice.request.arrived_ns + 1
    choice.timeline.pull_bytes = choice.timeline.pull_spans = 0
    choice.timeline.pull_verified = True
    metrics.observe(choice, has_failed=False)
    assert not [key for key in _samples(metrics) if "transport" in dict(key[1:])]
    choice.timeline.pull_bytes = 1
    metrics.observe(choice, has_failed=False)
    assert _value(metrics, "handoff_verified_total", transport="shm") == 1


def test_the_parts_of_ttft_add_up():
    metrics = _metrics()
    _served(metrics)
    samples = _samples(metrics)
    parts = {dict(k[1:])["part"]: v for k, v in samples.items() if "ttft_part_seconds_sum" in k[0]}
    assert set(parts) == {
        "queue", "prefill", "offer", "wait_for_room", "pull", "first_decode", "residual",
    }  # fmt: skip
    assert sum(parts.values()) == pytest.approx(_value(metrics, "time_to_first_token_seconds_sum"))


def test_counters():
    metrics = _metrics()
    _served(metrics)
    _served(metrics)
    metrics.count_failure(CapacityExceeded("full", 1.0))
    assert _value(metrics, "prompt_tokens_total") == 4
    assert _value(metrics, "generation_tokens_total") == 6
    assert _value(metrics, "request_success_total", finished_reason="length") == 2
    assert _value(metrics, "request_failure_total", code="capacity_exceeded") == 1


def test_a_failed_choice_is_no_success():
    metrics = _metrics()
    metrics.observe(choice_of(), has_failed=True)
    assert not any("request_success_total" in key[0] for key in _samples(metrics))


def test_workers_are_read_at_the_scrape():
    metrics = _metrics()
    labels = {"worker": "decode-0", "role": "decode"}
    assert _value(metrics, "kv_cache_usage_perc", **labels) == pytest.approx(0.25)
    assert _value(metrics, "prefix_cache_queries_total", **labels) == 50
    assert _value(metrics, "prefix_cache_hits_total", **labels) == 20
    assert _value(metrics, "num_preemptions_total", **labels) == 4
    assert _value(metrics, "handoff_corrupt_total", **labels) == 5
    assert _value(metrics, "handoff_recomputed_total", **labels) == 6
    assert _value(metrics, "handoff_expired_total", **labels) == 7
    assert _value(metrics, "kv_fragmentation", **labels, group="0") == 0
    assert _value(metrics, "kv_fragmentation", **labels, group="1") == 0.75
    assert _value(metrics, "num_requests_running") == 0
    assert _value(metrics, "num_requests_waiting") == 0


def test_a_worker_without_a_report_has_no_figures():
    assert not any("kv_cache_usage" in key[0] for key in _samples(_metrics(None)))


def test_the_fullest_group_counts():
    load = msgspec.structs.replace(LOAD, free_blocks=(60, 5), cached_blocks=(15, 0))
    info = msgspec.structs.replace(worker_info(), num_blocks=(100, 50))
    assert kv_cache_usage(info, load) == pytest.approx(0.9)


def test_two_applications_share_nothing():
    first, second = _metrics(), _metrics()
    _served(first)
    assert _value(second, "prompt_tokens_total") == 0


def test_predictions_are_beside_what_came_of_them():
    service = ScriptedService(text_script("x"))
    metrics = Metrics("tiny", service.status, service.accuracy)
    assert _value(metrics, "ttft_prediction_count_total") == 2
    assert _value(metrics, "ttft_prediction_predicted_seconds_total") == 3.0
    assert _value(metrics, "ttft_prediction_actual_seconds_total") == 4.0
    assert _value(metrics, "tpot_prediction_count_total") == 0


def test_the_regime_the_loads_and_what_is_expected_of_each_worker():
    status = ScriptedService(text_script("x")).status()
    worker = replace(status.workers[0], role=Role.PREFILL, backlog_ms=250.0, num_decodes=3)
    busy = replace(
        status, workers=(worker,), regime="overloaded", load_prefill=1.5, flips=2, wanted_workers=4
    )
    metrics = Metrics("tiny", lambda: busy)
    assert _value(metrics, "regime", regime="overloaded") == 1
    assert _value(metrics, "regime", regime="normal") == 0
    assert _value(metrics, "load", side="prefill") == 1.5
    assert _value(metrics, "role_flips_total") == 2
    assert _value(metrics, "wanted_workers") == 4
    # Labelled by the role that it has now, not by the one that it came with.
    labels = {"worker": "decode-0", "role": "prefill"}
    assert _value(metrics, "worker_backlog_seconds", **labels) == 0.25
    assert _value(metrics, "worker_decodes", **labels) == 3


def test_tiers_are_told_by_their_names_and_not_at_all_without_any():
    tier = TierLoad("dram", 8, 2, 3, 4, 5, 6, 7, 8, exposed_ns=2_000_000_000, decode_ns=5_000_000)
    metrics = _metrics(replace(LOAD, tiers=(tier,)))
    labels = {"worker": "decode-0", "role": "decode", "tier": "dram"}
    assert _value(metrics, "kv_tier_usage_perc", **labels) == 0.25
    assert _value(metrics, "kv_tier_hits_total", **labels) == 3
    assert _value(metrics, "kv_tier_onboarded_bytes_total", **labels) == 5
    assert _value(metrics, "kv_tier_exposed_seconds_total", **labels) == 2
    assert _value(metrics, "kv_tier_decode_seconds_total", **labels) == 0.005
    assert not [name for name, *_ in _samples(_metrics()) if "kv_tier" in name]
