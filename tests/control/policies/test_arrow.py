"""Arrow's two numbers: the other kind of work first, then the own."""

from tests.control.story import Story


def test_workers_free_of_the_other_kind_come_first_then_the_least_busy() -> None:
    story = Story("p0", "p1", "d0", "d1", num_blocks=4096, policy="arrow")
    for number in range(4):
        story.submit(f"r{number}", 500)
    assert story.pairs() == [("p0", "d0"), ("p1", "d1"), ("p0", "d0"), ("p1", "d1")]


def test_what_would_break_the_tpot_comes_last() -> None:
    story = Story("p0", "d0", "d1", num_blocks=10**6, policy="arrow", slo_tpot_ms=7.0)
    story.submit("long", 30_000)
    assert story.pairs() == [("p0", "d0")]
    story.offered("p0", "long")
    for number in range(3):
        story.submit(f"r{number}", 500)
    # Tokens alone would have sent them all to d1 too; what counts is that d0 is over its budget.
    assert {decode for _, decode in story.pairs()} == {"d1"}
