"""A cluster's text as workers, and back."""

import pytest

from penstock.core.errors import BadRequest
from penstock.core.types import Role
from penstock.sim.fleet import describe_fleet, num_gpus, parse_fleet


def test_workers_have_names_roles_and_hosts_that_fill_up() -> None:
    fleet = parse_fleet("6xH100:prefill,3*h100:decode,L20", "llama3.1-8b")
    assert [m.name for m in fleet][4:8] == ["prefill-4", "prefill-5", "decode-0", "decode-1"]
    assert [m.host for m in fleet] == [0] * 8 + [1] + [2]
    assert fleet[-1].role is Role.MIXED
    assert fleet[-1].hardware.gpu == "L20"
    assert num_gpus(fleet) == 10


def test_a_worker_of_several_gpus_takes_their_room() -> None:
    fleet = parse_fleet("2xH100-tp4:prefill,1xH100-tp8:decode", "llama3.1-70b")
    assert [m.host for m in fleet] == [0, 0, 1]
    assert num_gpus(fleet) == 16
    text = describe_fleet(fleet)
    assert parse_fleet(text, "llama3.1-70b") == fleet


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("4xH100:cook", "not a role"),
        ("4xB900:prefill", "no profile"),
        ("4xH100-tp4", "no profile"),
        ("0xH100", "no workers"),
        ("four", "COUNTxGPU"),
        ("", "COUNTxGPU"),
    ],
)
def test_what_is_wrong_is_said(text: str, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        parse_fleet(text, "llama3.1-8b")
