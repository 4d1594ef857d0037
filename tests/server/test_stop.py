"""Stop strings against a search that sees one character at a time."""

from hypothesis import given
from hypothesis import strategies as st

from penstock.server.stop import StopStrings

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def _run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    text = ""
    for piece in pieces:
        released, found = matcher.push(piece)
        text += released
        if found is not None:
            return text, found
    return text + matcher.flush(), None


def _reference(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(STOPS, st.lists(st.text("abc", max_size=5), max_size=10))
def test_where_pieces_are_cut_makes_no_difference(stops, pieces):
    assert _run(stops, pieces) == _reference(stops, "".join(pieces))


@given(STOPS, st.lists(st.text("abc", max_size=5), max_size=10))
def test_no_more_is_held_than_could_become_a_stop_string(stops, pieces):
    matcher = StopStrings(stops)
    for piece in pieces:
        _, found = matcher.push(piece)
        if found is not None:
            return
        held = matcher.flush()
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        matcher.push(held)


def test_the_one_that_ends_first_wins():
    assert _run(["abc", "b"], ["xabcx"]) == ("xa", "b")
    assert _run(["b", "ab"], ["xab"]) == ("x", "ab")


def test_text_that_turns_out_harmless_is_let_through():
    matcher = StopStrings(["###"])
    assert matcher.push("a#") == ("a", None)
    assert matcher.push("#") == ("", None)
    assert matcher.push(" b") == ("## b", None)
    assert matcher.flush() == ""
