"""`penstock explain`: how an explanation reads."""

from msgspec.structs import replace

from penstock.cli.explain import tell
from penstock.core.types import RequestId
from tests.server.double import explanation_of

ONE = explanation_of(RequestId("cmpl-1"))


def test_predicted_stands_beside_actual_and_the_chosen_are_marked():
    lines = list(tell(ONE))
    assert lines[0] == "cmpl-1: finished, policy predicted"
    assert lines[1].endswith("waited 0.2 ms, then prefill on prefill-0, decode on decode-0")
    assert "TTFT                10.00      10.00" in lines
    chosen = [line.split()[:2] for line in lines if line.endswith("chosen")]
    assert chosen == [["prefill-0", "prefill"], ["decode-0", "decode"]]
    assert [line for line in lines if line.startswith("decode-0") and line.endswith("full")]


def test_what_has_not_happened_is_not_a_zero():
    (row,) = (
        line for line in tell(replace(ONE, actual=None, outcome="")) if line.startswith("TTFT")
    )
    assert row.split() == ["TTFT", "10.00", "-"]
    assert next(tell(replace(ONE, outcome=""))) == "cmpl-1: under way, policy predicted"


def test_one_worker_for_both_and_a_further_attempt():
    alone = replace(ONE, prefill_worker="decode-0", attempt=2)
    first, second = list(tell(alone))[:2]
    assert first == "cmpl-1: finished, attempt 2, policy predicted"
    assert second.endswith("decode-0 does both: prefill and decode")
    # What would have been taken for a pair is not marked as if it had been.
    assert [line.split()[1] for line in tell(alone) if line.endswith("chosen")] == ["alone"]
