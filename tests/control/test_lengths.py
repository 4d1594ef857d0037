"""Expected lengths follow the answers and never exceed what a request may have."""

from penstock.control.lengths import START_TOKENS, OutputLengths


def test_they_follow_what_was_seen() -> None:
    lengths = OutputLengths()
    assert lengths.expect(10**6) == START_TOKENS
    assert lengths.expect(7) == 7
    for _ in range(1000):
        lengths.note(50)
    assert 45 <= lengths.expect(10**6) <= 55
    for _ in range(1000):
        lengths.note(500)
    assert 450 <= lengths.expect(10**6) <= 500
    assert lengths.expect(0) == 1
