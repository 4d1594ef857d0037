"""Timelines add up and states form a table without dead ends."""

import pytest

from penstock.core.request import REQUEST_TRANSITIONS, RequestState, Timeline


def test_parts_add_up_to_ttft_with_a_hand_off() -> None:
    timeline = Timeline(
        arrived_ns=1_000,
        prefill_started_ns=2_000,
        offered_ns=5_000,
        offer_received_ns=5_500,
        reserved_ns=6_000,
        pulled_ns=9_000,
        first_token_ns=9_900,
    )
    parts = timeline.ledger(delivered_ns=10_000)
    assert parts["wait_for_room"] == pytest.approx(5e-7)
    assert parts["ttft"] == pytest.approx(9e-6)
    assert sum(v for k, v in parts.items() if k != "ttft") == pytest.approx(parts["ttft"])


def test_parts_add_up_without_one() -> None:
    parts = Timeline(arrived_ns=1, prefill_started_ns=3, first_token_ns=10).ledger(12)
    assert set(parts) == {"queue", "prefill", "residual", "ttft"}
    assert parts["ttft"] == pytest.approx(11e-9)


def test_every_state_leads_to_an_end() -> None:
    ends = {state for state, following in REQUEST_TRANSITIONS.items() if not following}
    assert ends == {RequestState.FINISHED, RequestState.ABORTED, RequestState.FAILED}
    for state, following in REQUEST_TRANSITIONS.items():
        assert state in ends or ends <= following
