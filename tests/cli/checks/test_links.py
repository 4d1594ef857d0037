"""What is said of the links of a cluster: one line a pair, and what is not possible once."""

from copy import deepcopy
from typing import Any

from penstock.cli.checks.finding import Extent, Finding, State
from penstock.cli.checks.links import check_links
from penstock.core.errors import WorkersUnavailable

WAYS = [
    {
        "kind": "shm",
        "name": "shm",
        "used": True,
        "refusal": "",
        "opening_s": 0.0003,
        "num_bytes": 1,
        "bytes_per_s": 9.1e9,
        "limit": "a copy in one process",
        "share": 1.2,
    },
    {"kind": "tcp", "refusal": "{owner} does not serve it", "used": False},
]
LINK = {
    "fingerprint": "aa",
    "incompatibility": "",
    "clock_skew_s": 1e-6,
    "clock_skew_within_s": 5e-5,
}


class Client:
    """Answers as a server with these workers; `changes` are made to the link of one pair."""

    def __init__(self, *workers: str, silent: str = "", **changes: Any) -> None:
        self.workers, self.silent, self.changes = workers, silent, changes
        self.asked: list[tuple[str, dict[str, object]]] = []

    def get(self, path: str) -> dict[str, Any]:
        assert path == "/cluster"
        return {"workers": [{"id": worker} for worker in self.workers]}

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        self.asked.append((path, body))
        reader = path.split("/")[3]
        if reader == self.silent:
            raise WorkersUnavailable("it says nothing")
        owners = [worker for worker in self.workers if worker != reader]
        return {"reader": reader, "fingerprint": "aa", "links": [self._link(o) for o in owners]}

    def _link(self, owner: str) -> dict[str, Any]:
        ways = deepcopy(WAYS)
        ways[1]["refusal"] = f"{owner} does not serve it"
        changed = self.changes if owner == self.workers[0] else {}
        return {**LINK, "owner": owner, "ways": ways, **changed}


def look(client: Client) -> dict[str, Finding]:
    return {f.name: f for f in check_links(Extent(moved_bytes=1 << 20), client)}  # type: ignore[arg-type]


def test_every_pair_has_a_line_and_what_is_not_possible_is_said_once():
    client = Client("p0", "d0", "d1")
    found = look(client)
    pairs = [name for name in found if "←" in name]
    assert pairs == [f"{a} ← {b}" for a in ("p0", "d0", "d1") for b in client.workers if a != b]
    assert {body["moved_bytes"] for _, body in client.asked} == {1 << 20}
    line = found["d0 ← p0"]
    assert line.state is State.OK
    assert line.said == (
        "shm 9.10 GB/s, 1.20 of a copy in one process, opened in 0.3 ms; "
        "clocks +1 µs apart, known to 50; KV aa on both sides"
    )
    assert line.figures["shm_share"] == 1.2
    assert found["tcp"].said == "not possible for 6 of 6 pairs: the owner does not serve it"


def test_what_is_slow_or_out_of_step_is_a_warning():
    slow = deepcopy(WAYS)
    slow[0]["share"] = 0.1
    assert look(Client("p0", "d0", ways=slow))["d0 ← p0"].state is State.WARNING
    late = look(Client("p0", "d0", clock_skew_s=0.1))["d0 ← p0"]
    assert (late.state, late.figures["clock_skew_s"]) == (State.WARNING, 0.1)
    mute = look(Client("p0", "d0", clock_skew_s=None))["d0 ← p0"]
    assert mute.state is State.WARNING
    # As far as it is known they agree.
    vague = look(Client("p0", "d0", clock_skew_s=0.1, clock_skew_within_s=0.2))["d0 ← p0"]
    assert vague.state is State.OK


def test_another_shape_is_cut_and_another_model_is_a_failure():
    cut = look(Client("p0", "d0", fingerprint="bb"))["d0 ← p0"]
    assert cut.state is State.OK
    assert "KV bb there, aa here: cut on the way" in cut.said
    reason = "layouts aa (ours) and cc (theirs) do not go together"
    other = look(Client("p0", "d0", fingerprint="cc", incompatibility=reason))["d0 ← p0"]
    assert other.state is State.FAILED
    assert reason in other.said


def test_a_pair_without_a_way_fails():
    ways = [WAYS[1] | {"refusal": "p0 does not serve it"}]
    found = look(Client("p0", "d0", ways=ways))["d0 ← p0"]
    assert found.state is State.FAILED
    assert "no transport leads there" in found.said
    # One that leads there and that requests do not take is of no help.
    idle = [{**WAYS[0], "used": False}]
    assert look(Client("p0", "d0", ways=idle))["d0 ← p0"].state is State.FAILED


def test_a_worker_that_does_not_answer_fails_and_the_others_are_tried():
    found = look(Client("p0", "d0", silent="p0"))
    assert found["p0"].state is State.FAILED
    assert found["d0 ← p0"].state is State.OK


def test_one_worker_has_no_pair():
    assert [f.state for f in look(Client("m0")).values()] == [State.OK]


def test_no_server():
    class Nobody(Client):
        def get(self, path: str) -> dict[str, Any]:
            raise WorkersUnavailable("no server answers")

    found = look(Nobody())
    assert found["server"].state is State.FAILED
    assert "--cluster URL" in found["server"].advice


def test_a_server_that_loads_is_to_be_asked_again():
    class Loading(Client):
        def get(self, path: str) -> dict[str, Any]:
            raise WorkersUnavailable("the model is loading: packing (10%)")

    found = look(Loading())["server"]
    assert found.state is State.FAILED
    assert "ask again" in found.advice
