"""What a core waited for, from logs that are written here by hand."""

import json
from pathlib import Path

import pytest

from penstock.core.errors import BadRequest
from penstock.core.events import Send, Woken
from penstock.core.messages import TokenOutput, Tokens
from penstock.core.node import DecisionLog
from penstock.core.request import Timeline
from penstock.core.types import CONTROLLER, RequestId, WorkerId
from penstock.sim.fabric import FIRST_TOKENS, kind_of
from penstock.sim.worker_log import TakenPull, read_worker_logs


def entry(now_ns: int, event: dict[str, object], *commands: dict[str, object]) -> str:
    return json.dumps({"now_ns": now_ns, "event": event, "commands": commands}) + "\n"


def send(to: str, message: dict[str, object]) -> dict[str, object]:
    return {"type": "Send", "to": to, "message": message}


def run(num_new: list[int], num_computed: list[int]) -> dict[str, object]:
    return {"type": "RunStep", "step": {"num_new": num_new, "num_computed": num_computed}}


DONE: dict[str, object] = {"type": "StepDone"}
MOVE: dict[str, object] = {"type": "SubmitMove", "move": {"move_id": 7, "source": "prefill-0"}}
LANDED: dict[str, object] = {
    "type": "MoveDone",
    "move_id": 7,
    "num_bytes": 640,
    "num_spans": 2,
    "error": None,
}
TOKENS: dict[str, object] = {"type": "Tokens", "outputs": [["r", [5], [], None, None]]}


def assign(**timeline: int) -> dict[str, object]:
    return {"type": "Assign", "request": {"request_id": "r"}, "timeline": timeline}


def write(folder: Path) -> str:
    """A prompt of 9 is prefilled; the second prefill runs while the other worker decodes."""
    path = folder / "log"
    path.write_text(
        entry(0, {"type": "Submit"}, send("prefill-0", assign(arrived_ns=1)))
        + entry(900, TOKENS, send("front", TOKENS))
        + entry(950, TOKENS, send("front", TOKENS))
    )
    (folder / "log.prefill-0.1").write_text(
        entry(100, assign(arrived_ns=1, prefill_started_ns=100), run([8], [0]))
        + entry(400, DONE, run([4], [8]))
        + entry(800, DONE)
    )
    (folder / "log.decode-0.1").write_text(
        entry(200, {"type": "Offer"}, MOVE)
        + entry(350, LANDED, run([1, 1], [8, 3]))
        + entry(500, DONE, send("controller", TOKENS), run([1, 1], [9, 4]))
        + entry(700, DONE, send("controller", TOKENS))
    )
    return str(path)


def test_a_step_a_pull_and_a_message_last_from_event_to_event(tmp_path: Path) -> None:
    taken = read_worker_logs(write(tmp_path))
    first, second = taken.steps[WorkerId("prefill-0")]
    assert (first.prefill_tokens, first.prefill_work, first.duration_ns) == (8, 64, 300)
    assert (second.prefill_tokens, second.prefill_work, second.duration_ns) == (4, 16 + 64, 400)
    decode, _ = taken.steps[WorkerId("decode-0")]
    assert (decode.decodes, decode.context_tokens, decode.duration_ns) == (2, 13, 150)
    assert taken.pulls == [TakenPull(640, 2, 150)]
    # Equal words in order; stamps that one side has seen and the other not make no difference;
    # what the controller says to the front is no message.
    assert taken.messages_ns == {"Tokens": [400, 250], "Assign": [100]}


def test_messages_with_a_first_token_are_a_kind_of_their_own(tmp_path: Path) -> None:
    """The simulated fabric has to look for their times under the same name."""
    output = TokenOutput(RequestId("r"), (5,), timeline=Timeline(arrived_ns=1))
    later = TokenOutput(RequestId("s"), (6,))
    said = [
        Tokens(worker_id=WorkerId("mixed-0"), outputs=outputs)
        for outputs in ((output, later), (later,))
    ]
    written: dict[str, list[bytes]] = {"log.mixed-0.1": [], "log": []}
    worker, controller = (DecisionLog(sink=lines.append) for lines in written.values())
    for number, message in enumerate(said, 1):
        worker.record(1000 * number, Woken("step"), [Send(CONTROLLER, message)])
        controller.record(1100 * number, message, [])
    for name, lines in written.items():
        (tmp_path / name).write_bytes(b"".join(lines))
    assert read_worker_logs(str(tmp_path / "log")).messages_ns == {
        kind_of(said[0]): [100],
        kind_of(said[1]): [200],
    }
    assert [kind_of(message) for message in said] == [FIRST_TOKENS, "Tokens"]


def test_a_step_beside_another_worker_s_is_told_from_one_alone(tmp_path: Path) -> None:
    taken = read_worker_logs(write(tmp_path))
    assert [step.is_crowded for step in taken.steps[WorkerId("prefill-0")]] == [False, True]
    assert [step.is_crowded for step in taken.steps[WorkerId("decode-0")]] == [True, True]


def test_only_what_began_in_between_is_taken(tmp_path: Path) -> None:
    taken = read_worker_logs(write(tmp_path), (300, 600))
    assert [len(steps) for steps in taken.steps.values()] == [2, 1]
    assert taken.pulls == []
    assert taken.messages_ns == {"Tokens": [400]}
    taken.add(read_worker_logs(str(tmp_path / "log"), (0, 300)))
    assert [len(steps) for steps in taken.steps.values()] == [2, 2]
    assert len(taken.pulls) == len(taken.messages_ns["Assign"]) == 1


def test_a_log_that_is_none_or_alone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("")
    with pytest.raises(BadRequest, match="no worker's log beside it"):
        read_worker_logs(str(path))
    (tmp_path / "log.mixed-0.1").write_text(entry(1, DONE) + "{junk}\n")
    with pytest.raises(BadRequest, match=r"mixed-0\.1:2 is no decision"):
        read_worker_logs(str(path))
    (tmp_path / "log.mixed-0.1").write_text(entry(1, DONE) + '{"now_ns"')
    assert read_worker_logs(str(path)).steps == {}


def test_a_worker_s_lives_are_one_and_its_name_may_have_dots(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text("")
    for epoch in (1, 2):
        life = entry(1000 * epoch, {"type": "Woken"}, run([1], [5])) + entry(1000 * epoch + 9, DONE)
        (tmp_path / f"run.log.mixed-a.example-0.{epoch}").write_text(life)
    taken = read_worker_logs(str(path))
    assert list(taken.steps) == ["mixed-a.example-0"]
    assert [step.duration_ns for step in taken.steps[WorkerId("mixed-a.example-0")]] == [9, 9]


def test_rounds_of_a_step_are_steps(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "log.decode-0.1").write_text(
        entry(100, {"type": "Offer"}, run([1, 1], [9, 4]))
        + entry(150, {**DONE, "goes_on": True})
        + entry(210, {**DONE, "goes_on": True})
        + entry(300, {**DONE, "goes_on": False})
    )
    steps = read_worker_logs(path).steps[WorkerId("decode-0")]
    assert [step.duration_ns for step in steps] == [50, 60, 90]
    assert [step.context_tokens for step in steps] == [15, 17, 19]
    assert [step.decodes for step in steps] == [2, 2, 2]
