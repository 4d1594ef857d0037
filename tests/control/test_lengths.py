"""Expected lengths follow the answers and never exceed what a request may have."""

from penstock.control.lengths import START_TOKENS, OutputLengths


def note(lengths: OutputLengths, num_tokens: int) -> None:
    lengths.note_tokens(num_tokens)
    lengths.note_end()


def test_they_follow_what_was_seen() -> None:
    lengths = OutputLengths()
    assert lengths.expect(10**6) == START_TOKENS
    assert lengths.expect(7) == 7
    for _ in range(1000):
        note(lengths, 50)
    assert 45 <= lengths.expect(10**6) <= 55
    for _ in range(1000):
        note(lengths, 500)
    assert 450 <= lengths.expect(10**6) <= 500
    assert lengths.expect(0) == 1


def test_long_answers_count_before_they_are_over_and_short_ones_are_not_all_there_is() -> None:
    lengths = OutputLengths()
    # A hundred of 10 tokens and a hundred of 990 begin together; the short ones have ended.
    for _ in range(10):
        lengths.note_tokens(200)
    for _ in range(100):
        lengths.note_end()
    for _ in range(200):
        lengths.note_tokens(100)
    assert lengths.expect(10**6) > 200
