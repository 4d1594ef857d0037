"""The cores over modelled hardware: times that can be worked out, faults, and runs of steps."""

import random
from dataclasses import replace

import pytest

from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_MS, NS_PER_S
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fabric import FabricCost
from penstock.sim.fleet import parse_fleet
from penstock.sim.observe import Observation
from penstock.sim.profile import layout_of
from penstock.sim.serve import Fault, ModelledCluster, ServeSpec
from penstock.sim.workload import Arrival, Turn

MODEL = "llama3.1-8b"
PAIR = parse_fleet("H100:prefill,H100:decode", MODEL)


def serve(
    arrivals: list[Arrival], spec: ServeSpec | None = None, faults: list[Fault] | None = None
) -> Observation:
    cluster = ModelledCluster(spec or ServeSpec(members=PAIR), arrivals)
    seen = cluster.run(limit_s=10_000, faults=faults or [])
    for worker in cluster.workers.values():
        worker.core.check()
    cluster.controller.check()
    assert not seen.unfinished
    return seen


def test_the_parts_of_one_request_are_the_model_s_times() -> None:
    spec = ServeSpec(members=PAIR, fabric=FabricCost(inner_bytes_per_s=10e9, span_ns=7000))
    seen = serve([Arrival(NS_PER_S, ((9, 1025),), 11)], spec)
    (served,) = seen.served
    assert served.timeline is not None
    times = PAIR[0].hardware.times
    parts = served.timeline.ledger(served.first_token_ns)
    prefill_s = times.duration_ns(1024, 1024 * 1024, 0, 0) / NS_PER_S
    assert parts["prefill"] == pytest.approx(prefill_s, abs=1e-8)
    num_bytes = 1024 * layout_of(MODEL, 128).token_bytes
    assert served.timeline.pull_bytes == seen.bytes_moved == num_bytes
    assert served.timeline.pull_spans == 1
    assert parts["pull"] == pytest.approx(num_bytes / 10e9 + 27e-6, abs=1e-8)
    decode_s = [times.duration_ns(0, 0, 1, 1025 + i) / NS_PER_S for i in range(11)]
    assert parts["first_decode"] == pytest.approx(decode_s[0], abs=1e-8)
    assert served.tpot_s == pytest.approx(sum(decode_s[1:]) / 10, rel=1e-6)
    assert served.num_tokens == 11


def test_steps_run_in_a_row_change_nothing() -> None:
    """Every request gets its first and its last token at the same time, to 20 microseconds: whole
    nanoseconds are rounded once a step or once a run.
    """
    rng = random.Random(4)
    arrivals = [
        Arrival(
            int(rng.random() * 20 * NS_PER_S),
            ((rng.randrange(5, 9), rng.randrange(1, 700)), (100 + i, rng.randrange(1, 900))),
            rng.randrange(1, 400),
        )
        for i in range(150)
    ]
    arrivals.sort(key=lambda arrival: arrival.at_ns)
    spec = ServeSpec(members=parse_fleet("L20:prefill,2xL20:decode,L20:mixed", MODEL))
    seen = [serve(arrivals, replace(spec, max_repeats=n)) for n in (1, 64)]
    assert seen[0].num_steps == seen[1].num_steps
    assert seen[1].num_messages < seen[0].num_messages / 3
    for one, other in zip(seen[0].served, seen[1].served, strict=True):
        assert one.first_token_ns == pytest.approx(other.first_token_ns, abs=20_000)
        assert one.finished_ns == pytest.approx(other.finished_ns, abs=20_000)
        assert one.num_tokens == other.num_tokens == one.output_tokens


def test_the_same_run_twice_is_the_same() -> None:
    arrivals = make_workload(WorkloadSpec(source="chat", rate=2.0, duration_s=30.0))
    first, second = serve(arrivals), serve(arrivals)
    assert first.served == second.served
    assert first.samples == second.samples


def test_turns_follow_their_answers_and_hit_the_prefix_cache() -> None:
    seen = serve([Arrival(0, ((9, 4096),), 100, (Turn(NS_PER_S, 512, 50), Turn(0, 512, 5)))])
    first, second, third = seen.served
    assert second.arrived_ns == first.finished_ns + NS_PER_S
    assert third.arrived_ns == second.finished_ns
    assert (second.input_tokens, third.input_tokens) == (4096 + 100 + 512, 4708 + 50 + 512)
    assert seen.prefix_hits >= 2 * 3968


def test_a_worker_that_is_killed_comes_back_and_no_request_is_lost() -> None:
    arrivals = make_workload(WorkloadSpec(source="lognormal", rate=10.0, duration_s=30.0))
    spec = ServeSpec(members=parse_fleet("2xH100:prefill,2xH100:decode", MODEL))
    faults = [Fault("decode-0", 10 * NS_PER_S), Fault("prefill-1", 12 * NS_PER_S)]
    calm, struck = serve(arrivals, spec), serve(arrivals, spec, faults)
    assert [s.num_tokens for s in struck.served] == [s.output_tokens for s in calm.served]
    assert not any(s.error for s in struck.served)
    worst = [max(s.e2e_s for s in seen.served) for seen in (calm, struck)]
    assert worst[1] > worst[0]


def test_a_slow_worker_is_slow() -> None:
    arrivals = [Arrival(NS_PER_S, ((9, 1000),), 100)]
    slow = serve(arrivals, faults=[Fault("decode-0", 1, speed=0.5)])
    calm = serve(arrivals)
    assert slow.served[0].tpot_s == pytest.approx(2 * calm.served[0].tpot_s, rel=1e-4)


def test_moves_out_of_one_host_share_its_card() -> None:
    """Two prefill workers of one host finish together; the pulls take twice as long as alone."""
    members = parse_fleet("2xH100:prefill,2xH100:decode", MODEL)
    members = tuple(replace(m, host=int(m.name.startswith("decode"))) for m in members)
    spec = ServeSpec(members=members, fabric=FabricCost(card_bytes_per_s=1e9))
    together = serve([Arrival(NS_PER_MS, ((i, 4097),), 5) for i in (8, 9)], spec)
    alone = serve([Arrival(NS_PER_MS, ((8, 4097),), 5)], spec)
    pulls = [s.timeline.ledger(0)["pull"] for s in together.served + alone.served if s.timeline]
    assert pulls[0] == pytest.approx(2 * pulls[2], rel=1e-3)
    assert pulls[1] == pytest.approx(2 * pulls[2], rel=1e-3)


def test_nobody_waits_for_a_full_worker_while_one_that_is_new_has_room() -> None:
    """Answers that turn out longer fill the one that has had them all the time."""
    members = parse_fleet("L20:prefill,2xL20:decode", MODEL)
    control = ControllerConfig(policy="predicted")
    spec = ServeSpec(members=members, controller=control, respawn_ns=95 * NS_PER_S)
    long = [Arrival(2 * NS_PER_S + i * NS_PER_S // 5, ((i, 100),), 4000) for i in range(56)]
    after = [
        Arrival((100 * NS_PER_S + i * NS_PER_S // 5), ((99 + i, 1000),), 300) for i in range(200)
    ]
    seen = serve(long + after, spec, [Fault("decode-1", NS_PER_S)])
    assert max(s.held_share for s in (x.workers["decode-0"] for x in seen.samples)) > 0.97
    assert max(served.ttft_s for served in seen.served) < 5


def test_samples_say_who_was_busy_and_with_what() -> None:
    arrivals = make_workload(WorkloadSpec(source="fixed:in=4000", rate=4.0, duration_s=20.0))
    seen = serve(arrivals)
    last = seen.samples[-1]
    assert last.roles == {"prefill-0": "prefill", "decode-0": "decode"}
    prefill, decode = last.workers["prefill-0"], last.workers["decode-0"]
    assert prefill.busy_ns == prefill.prefill_ns > 0
    assert decode.prefill_ns == 0 < decode.busy_ns < last.at_ns
    assert last.num_arrived == len(arrivals)


def test_the_limit_ends_a_run_and_says_what_is_left() -> None:
    cluster = ModelledCluster(ServeSpec(members=PAIR), [Arrival(0, ((9, 1000),), 100_000)])
    assert cluster.run(limit_s=3.0).unfinished == 1


def test_workers_of_every_simulated_host_count_and_may_be_retired() -> None:
    control = ControllerConfig(
        policy="predicted",
        workers_min=2,
        workers_max=4,
        resize_pause_ms=1000.0,
        retire_after_ms=2000.0,
        usual_ttft_ms=1000.0,
    )
    members = parse_fleet("2xH100:prefill,2xH100:decode", MODEL, gpus_per_host=2)
    assert {member.host for member in members} == {0, 1}
    flood = [Arrival((20 * i) * NS_PER_MS, ((10 + i, 3000),), 30) for i in range(1500)]
    after = [Arrival(NS_PER_S * (90 + i), ((5000 + i, 300),), 10) for i in range(60)]
    seen = serve(flood + after, ServeSpec(members=members, controller=control))
    assert (seen.started, seen.retired) == (0, 2)
    assert len(seen.samples[-1].roles) == 2


def test_workers_come_with_a_wave_of_requests_and_go_after_it() -> None:
    control = ControllerConfig(
        policy="predicted",
        workers_min=2,
        workers_max=5,
        retire_after_ms=5000.0,
        usual_ttft_ms=1000.0,
    )
    wave = [Arrival((20 * i) * NS_PER_MS, ((10 + i, 3000),), 30) for i in range(1500)]
    after = [Arrival(NS_PER_S * (60 + i), ((5000 + i, 300),), 10) for i in range(60)]
    spec = ServeSpec(members=PAIR, controller=control, respawn_ns=2 * NS_PER_S)
    seen = serve(wave + after, spec)
    assert not [s.error for s in seen.served if s.error]
    counts = [len(sample.roles) for sample in seen.samples]
    assert (counts[0], max(counts), counts[-1]) == (0, 5, 2)
    assert (seen.started, seen.retired) == (3, 3)
    roles = [sorted(sample.roles.values()) for sample in seen.samples if len(sample.roles) == 5]
    assert roles[-1].count("prefill") >= 3  # long prompts and short answers
    assert seen.served == serve(wave + after, spec).served
