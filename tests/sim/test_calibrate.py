"""A simulator calibrated from a run whose truth is known predicts another load of that cluster."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import BadRequest
from penstock.core.node import DecisionLog
from penstock.core.step import Step
from penstock.core.types import NS_PER_MS, NS_PER_S
from penstock.sim.calibrate import Calibration, calibrate, fit_times
from penstock.sim.clock import SimClock
from penstock.sim.fabric import Fabric, FabricCost, MessageTimes
from penstock.sim.fleet import Member, parse_fleet
from penstock.sim.life import introduction
from penstock.sim.modelled import ModelledExecutor
from penstock.sim.observe import Observation
from penstock.sim.profile import Kind, Spread, StepTimes, size_of
from penstock.sim.serve import ModelledCluster, ModelledWorker, ServeSpec
from penstock.sim.summary import Slo, summarise
from penstock.sim.worker_log import Taken, TakenStep, read_worker_logs
from penstock.sim.workload import Arrival

MEMBERS = parse_fleet("H100:prefill,H100:decode", "llama3.1-8b")
UNEVEN = Spread(
    {
        Kind(False, False, False, 0): (0.9, 1.0, 1.1),
        Kind(False, True, False, 0): (2.0, 2.2),
        Kind(False, False, True, 0): (1.2, 1.3, 1.4),
        Kind(True, False, False, 0): (0.8, 1.0, 1.2),
        Kind(True, False, True, 0): (1.3, 1.7),
    }
)
FRONT_NS = (200_000, 400_000)


def truth() -> tuple[tuple[Member, ...], FabricCost]:
    """A cluster whose steps are uneven and whose messages are slow."""
    members = tuple(replace(m, hardware=replace(m.hardware, spread=UNEVEN)) for m in MEMBERS)
    messages = MessageTimes({"Assign": (2_000_000, 4_000_000), "Offer": (1_000_000,)})
    return members, FabricCost(inner_bytes_per_s=20e9, messages=messages, front_ns=FRONT_NS)


def load(rate: float, seed: int) -> list[Arrival]:
    rng, at_s, arrivals = random.Random(seed), 0.0, []
    for name in range(100, 340):
        at_s += rng.expovariate(rate)
        pieces = ((name, rng.choice((256, 1024, 3000))),)
        arrivals.append(Arrival(int(at_s * NS_PER_S), pieces, rng.choice((16, 64, 128))))
    return arrivals


def serve(
    members: tuple[Member, ...],
    fabric: FabricCost,
    arrivals: list[Arrival],
    log: DecisionLog | None = None,
) -> Observation:
    seen = ModelledCluster(ServeSpec(members=members, fabric=fabric), arrivals, log).run(
        limit_s=900
    )
    assert not seen.unfinished
    return seen


@pytest.fixture
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """What the logs of a run at 8 requests per second say."""
    path = tmp_path / "log"
    start = ModelledWorker.start

    def journal(name: str) -> DecisionLog:
        def write(line: bytes) -> None:
            with (tmp_path / name).open("ab") as file:
                file.write(line)

        return DecisionLog(limit=1, sink=write)

    infos = []

    def start_with_log(worker: ModelledWorker) -> None:
        worker._node.log = journal(f"log.{worker.member.name}.1")
        infos.append(introduction(worker.config, worker.member.hardware.profile))
        start(worker)

    monkeypatch.setattr(ModelledWorker, "start", start_with_log)
    serve(*truth(), load(8.0, 1), journal("log"))
    monkeypatch.undo()
    return calibrate(read_worker_logs(str(path)), infos, FRONT_NS)


def test_another_load_is_predicted(calibration: Calibration) -> None:
    arrivals = load(11.0, 2)
    was = summarise(serve(*truth(), arrivals), Slo())
    predicted = summarise(serve(calibration.members, calibration.fabric, arrivals), Slo())
    assert predicted.ttft_ms.p50 == pytest.approx(was.ttft_ms.p50, rel=0.1)
    assert predicted.ttft_ms.p99 == pytest.approx(was.ttft_ms.p99, rel=0.15)
    assert predicted.tpot_ms.p50 == pytest.approx(was.tpot_ms.p50, rel=0.05)
    assert predicted.tpot_ms.p99 == pytest.approx(was.tpot_ms.p99, rel=0.10)


def test_messages_and_links_are_those_of_the_run(calibration: Calibration) -> None:
    messages = calibration.fabric.messages
    assert messages is not None
    assert set(messages.seen_ns["Assign"]) >= {2_000_000, 4_000_000}
    assert min(messages.seen_ns["Offer"]) == 1_000_000
    assert calibration.fabric.inner_bytes_per_s == pytest.approx(20e9, rel=0.1)
    assert calibration.fabric.front_ns == FRONT_NS


def taken(rng: random.Random, duration_ns: Callable[[TakenStep], float]) -> list[TakenStep]:
    steps = []
    for number in range(300):
        new = rng.choice((0, 0, 100, 500))
        batch = rng.randrange(0 if new else 1, 9)
        step = TakenStep(new, new * new, batch, batch * rng.randrange(10, 900), 0)
        step.is_crowded = number % 3 == 0
        step.ended_ns = int(duration_ns(step))
        steps.append(step)
    return steps


def test_steps_of_prompts_and_decodes_together_teach_all_coefficients() -> None:
    times = StepTimes(2.0, 0.04, 2e-5, 1.0, 0.1, 1e-3)
    steps = taken(
        random.Random(0),
        lambda s: times.duration_ns(s.prefill_tokens, s.prefill_work, s.decodes, s.context_tokens),
    )
    fitted, spread = fit_times(steps)
    for name in ("a", "b", "c", "d", "e", "f"):
        assert getattr(fitted, name) == pytest.approx(getattr(times, name), rel=0.01)
    for ratios in spread.ratios.values():
        assert ratios == pytest.approx([1.0] * len(ratios), rel=0.01)


def test_neighbours_that_slow_each_other_down_are_told_by_the_ratios() -> None:
    steps = [
        TakenStep(0, 0, 4, 400, 0, 3_000_000 if crowded else 2_000_000, is_crowded=crowded)
        for crowded in (True, False, False) * 20
    ]
    _, spread = fit_times(steps)
    (size,) = {kind.size for kind in spread.ratios}
    (alone,) = set(spread.ratios[Kind(False, False, False, size)])
    (beside,) = set(spread.ratios[Kind(False, False, True, size)])
    assert beside == pytest.approx(1.5 * alone)


def test_a_stall_is_much_for_a_short_step_and_little_for_a_long_one() -> None:
    """Each size has its own ratios: a long prompt is not stalled as long as a short one times its
    length.
    """
    steps = [
        TakenStep(new, 0, 0, 0, 0, new * 10_000 + (5_000_000 if number % 10 == 0 else 0))
        for number in range(100)
        for new in (100, 10_000)
    ]
    times, spread = fit_times(steps)
    for new in (100, 10_000):
        expected_ns = times.duration_ns(new, 0, 0, 0)
        ratios = spread.like(Kind(True, False, False, size_of(expected_ns)))
        mean_ns = expected_ns * sum(ratios) / len(ratios)
        assert mean_ns == pytest.approx(new * 10_000 + 500_000, rel=0.01)


def test_steps_take_what_steps_of_as_many_sequences_took() -> None:
    """Up to four cost the same here: a line through all is too high for two, too low for one and
    for eight, and steps of about as long as each other must not share what it is off by.
    """
    truth_ms = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.05, 6: 1.6, 8: 2.4}
    steps = [
        TakenStep(0, 0, batch, 100 * batch, 0, int(ms * 1e6) + number)
        for batch, ms in truth_ms.items()
        for number in range(40)
    ]
    times, spread = fit_times(steps)
    for batch, ms in truth_ms.items() | {(5, 1.325), (7, 2.0), (9, 2.65)}:
        assert step_ms(batch, times, spread) == pytest.approx(ms, rel=0.03), batch


def step_ms(batch: int, times: StepTimes, spread: Spread) -> float:
    clock, ended = SimClock(), []
    executor = ModelledExecutor(clock, times, spread)
    step = Step(
        step_id=1,
        token_ids=np.zeros(batch, np.int64),
        num_new=np.ones(batch, np.int32),
        num_computed=np.full(batch, 99, np.int32),
        block_tables=(),
        samples=(),
    )
    executor.run(step, ended.append)
    assert clock.run(until_ns=NS_PER_S)
    return float(ended[0].finished_ns / NS_PER_MS)


def test_too_few_steps_are_said() -> None:
    with pytest.raises(BadRequest, match="it takes 32"):
        fit_times(taken(random.Random(0), lambda _: 1e6)[:31])


def test_a_newcomer_s_step_is_told_by_the_ratios() -> None:
    steps = [
        TakenStep(0, 0, 2, 200, 0, 2_000_000 if is_new else 1_000_000, has_newcomer=is_new)
        for is_new in (True, False, False) * 20
    ]
    _, spread = fit_times(steps)
    (size,) = {kind.size for kind in spread.ratios}
    (first,) = set(spread.ratios[Kind(False, True, False, size)])
    (usual,) = set(spread.ratios[Kind(False, False, False, size)])
    assert first == pytest.approx(2 * usual)


def test_a_worker_that_computed_no_prompts_borrows_their_times() -> None:
    """Else its prompts would take no time, or for ever: nothing that it did says how long."""
    prompt = TakenStep(100, 10_000, 0, 0, 0, 10_000_000)
    decode = TakenStep(0, 0, 4, 400, 0, 2_000_000)
    infos = [
        introduction(ModelledWorker(spec, Fabric(SimClock(), spec.fabric, {}), member, 1).config)
        for spec in [ServeSpec(members=MEMBERS)]
        for member in MEMBERS
    ]
    names = [info.worker_id for info in infos]
    taken = Taken({names[0]: [prompt] * 40, names[1]: [decode] * 40})
    for member in calibrate(taken, infos).members:
        times = member.hardware.times
        assert times.duration_ns(100, 10_000, 0, 0) == pytest.approx(10_000_000, rel=0.01)
        assert times.duration_ns(0, 0, 4, 400) == pytest.approx(2_000_000, rel=0.01)
