"""A conversation is recognised by its last block, and expected after the pause that it makes."""

from penstock.core.types import BlockHash
from penstock.kv.sessions import EARLY_SHARE, SESSIONS_MAX, SessionHistory, Visit


def names(*numbers: int) -> list[BlockHash]:
    return [BlockHash(number.to_bytes(4)) for number in numbers]


def test_a_second_turn_tells_when_the_third_is_due() -> None:
    sessions = SessionHistory()
    (n1, n2, n3, n4) = names(1, 2, 3, 4)
    assert sessions.visit([n1, n2], 1000) == Visit(None, n2, None)
    due_ns = 2000 + int(1000 * (1 - EARLY_SHARE))
    assert sessions.visit([n1, n2, n3], 2000) == Visit(n2, n3, due_ns)
    assert sessions.names(n3) == (n1, n2, n3)
    assert sessions.names(n2) == ()
    visit = sessions.visit([n1, n2, n3, n4], 5000)
    assert visit is not None
    assert visit.due_ns == 5000 + int(2000 * (1 - EARLY_SHARE))


def test_what_only_begins_alike_is_another_session() -> None:
    sessions = SessionHistory()
    first = sessions.visit(names(1, 2, 3), 0)
    second = sessions.visit(names(1, 2, 4), 10)
    assert first is not None
    assert second is not None
    assert second.before is None
    assert len(sessions) == 2


def test_a_prompt_of_less_than_a_block_is_no_session_and_old_ones_are_forgotten() -> None:
    sessions = SessionHistory()
    assert sessions.visit([], 0) is None
    for number in range(SESSIONS_MAX + 5):
        sessions.visit(names(number), number)
    assert len(sessions) == SESSIONS_MAX
    assert sessions.names(names(0)[0]) == ()
