"""A decision log explains a request as the controller that wrote it does."""

import json
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.cli.explain_log import LogExplainer
from penstock.core.events import Configured, Event
from penstock.core.explain import Explanation
from penstock.core.node import DecisionLog
from penstock.core.types import RequestId
from tests.control.story import Story

A, B, OWN = "cmpl-a", "chatcmpl-b", "cmpl-mine-0123abcd"


class Recorded(Story):
    """A story that is written down as production does."""

    def __init__(self, path: Path, *names: str, **settings: object) -> None:
        self._path = path
        self._log = DecisionLog(limit=1, sink=self._write)
        super().__init__(**settings)
        self.tell(Configured(self.controller.config))
        for name in names:
            self.join(name)

    def _write(self, line: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(line)

    def tell(self, event: Event) -> None:
        handle = self.controller.handle

        def recorded(event: Event, now_ns: int) -> list:
            commands = handle(event, now_ns)
            self._log.record(now_ns, event, commands)
            return commands

        self.controller.handle = recorded
        super().tell(event)
        self.controller.handle = handle

    def known(self, name: str) -> Explanation:
        explained = self.controller.explain(RequestId(name))
        assert explained is not None
        return explained


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


@pytest.fixture
def story(path: Path) -> Recorded:
    story = Recorded(path, "p0", "p1", "d0", num_blocks=4096, policy="predicted")
    for name in (A, B, OWN):
        story.submit(name, 700)
        story.offered("p0", name)
        story.tokens("d0", name, 1)
        story.tokens("d0", name, 2, is_last=True)
    return story


@pytest.mark.parametrize(
    ("asked", "name"), [(A, A), ("a", A), ("b", B), ("mine", OWN), (OWN, OWN), (OWN[5:], OWN)]
)
def test_it_says_what_the_controller_would(path: Path, story: Recorded, asked: str, name: str):
    explainer = LogExplainer(str(path), asked)
    assert explainer.explain() == [story.known(name)]
    assert explainer.num_differing == 0


def test_as_it_is_typed(path: Path, story: Recorded, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "mine", "--log", str(path), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["request_id"], one["outcome"], one["policy"]) == (OWN, "finished", "predicted")
    assert main(["explain", "mine", "--log", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{OWN}: finished, policy predicted\n")


def test_an_unknown_request_is_told_with_some_that_are_known(
    path: Path, story: Recorded, capsys: pytest.CaptureFixture[str]
):
    assert main(["explain", "min", "--log", str(path)]) == 1
    assert f"last requests: {A}, {B}, {OWN}" in capsys.readouterr().err


def test_one_that_nobody_was_there_for(path: Path, capsys: pytest.CaptureFixture[str]):
    Recorded(path).submit(A)
    assert main(["explain", A, "--log", str(path)]) == 1
    assert "was never given to a worker" in capsys.readouterr().err


def test_decisions_of_another_version_are_noticed(
    path: Path, story: Recorded, capsys: pytest.CaptureFixture[str]
):
    # Another worker was told to begin, as another rule would have it.
    text = path.read_text().replace('"to":"p0"', '"to":"p1"')
    path.write_text(text)
    assert main(["explain", A, "--log", str(path)]) == 0
    assert "1 decisions about it are not what this version decides" in capsys.readouterr().err


def test_a_last_line_that_was_cut_off_is_left_out(path: Path, story: Recorded):
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert LogExplainer(str(path), A).explain() == [story.known(A)]
    (cut,) = LogExplainer(str(path), OWN).explain()
    assert cut.outcome == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no decision"),
        (b"nonsense\n", "is no decision"),
        (b'{"now_ns":1,"event":{"type":"Drain"},"commands":[]}\n', "does not begin with"),
    ],
)
def test_what_is_no_log_of_a_controller(
    path: Path, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
):
    path.write_bytes(content)
    assert main(["explain", A, "--log", str(path)]) == 1
    assert words in capsys.readouterr().err
    assert main(["explain", A, "--log", str(path) + ".none"]) == 1
    assert "No such file" in capsys.readouterr().err
