"""One sequence: text, stop strings, log probabilities and how it ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.types import FinishReason
from penstock.server.choice import Choice
from tests.server.asking import choice_of, output_of, query_of
from tests.server.double import EOS, PIPE

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def _feed(choice: Choice, *texts) -> str:
    """Feed outputs; the last one ends the sequence unless a stop string did."""
    released = ""
    for at, text in enumerate(texts):
        if not choice.has_ended:
            last = at == len(texts) - 1
            released += choice.take(output_of(choice, text, LENGTH if last else None))
    return released


def _stopping(*stops: str, **params) -> Choice:
    return choice_of(query_of(params={"stop": stops} | params))


def test_plain_text_passes():
    choice = choice_of()
    assert _feed(choice, "he", "llo") == "hello"
    assert (choice.num_tokens, choice.finish_reason, choice.cached_tokens) == (5, "length", 3)


def test_a_stop_string_across_tokens_never_leaks():
    choice = _stopping("END")
    released = [choice.take(output_of(choice, c)) for c in "abENxEND"]
    assert "".join(released) == "abENx"
    assert choice.finish_reason == "stop"


def test_a_stop_string_in_the_middle_of_an_output_ends_the_count():
    choice = _stopping("b")
    assert choice.take(output_of(choice, "aabcc")) == "aa"
    assert choice.num_tokens == 3


def test_held_text_leaves_when_the_sequence_ends():
    choice = _stopping("END")
    assert choice.take(output_of(choice, "xEN")) == "x"
    assert choice.take(output_of(choice, [EOS], STOP)) == "EN"
    assert (choice.finish_reason, choice.num_tokens) == ("stop", 4)


def test_a_stop_string_in_the_last_output_wins_over_the_length():
    choice = _stopping("END")
    assert choice.take(output_of(choice, "xENDy", LENGTH)) == "x"
    assert choice.finish_reason == "stop"


def test_a_stop_string_may_be_included():
    choice = choice_of(query_of(params={"stop": ("END",)}, includes_stop=True))
    assert choice.take(output_of(choice, "xENDy")) == "xEND"


def test_the_first_tokens_stop_nothing():
    choice = _stopping("a", min_tokens=2)
    assert choice.take(output_of(choice, "aaba")) == "aab"
    assert choice.finish_reason == "stop"


def test_a_stop_string_made_of_half_characters():
    choice = _stopping("é")
    assert _feed(choice, *([byte] for byte in "xéy".encode())) == "x"
    assert choice.finish_reason == "stop"


def test_a_stop_token_is_not_shown():
    choice = choice_of(query_of(params={"stop_token_ids": (PIPE,)}))
    assert choice.take(output_of(choice, [*b"ab", PIPE], STOP)) == "ab"
    choice = choice_of(query_of(params={"stop_token_ids": (PIPE,)}, includes_stop=True))
    assert choice.take(output_of(choice, [*b"ab", PIPE], STOP)) == "ab||"
    choice = choice_of(query_of(params={"stop_token_ids": (PIPE,)}))
    assert choice.take(output_of(choice, [*b"ab", PIPE], LENGTH)) == "ab||", "it did not stop it"


def test_special_tokens_are_shown_if_asked_for():
    shown = choice_of(query_of(skip_special_tokens=False))
    assert shown.take(output_of(shown, [97, EOS, 98])) == "a<end>b"
    hidden = choice_of()
    assert hidden.take(output_of(hidden, [97, EOS, 98])) == "ab"


def test_half_a_character_at_the_end_is_replaced():
    choice = choice_of()
    assert _feed(choice, "a", "é".encode()[:1]) == "a\ufffd"


def test_reports_leave_with_their_text():
    choice = choice_of(query_of(params={"stop": ("END",), "logprobs": 1}))
    assert choice.take(output_of(choice, "xEN")) == "x"
    assert [(r.offset, r.token_id) for r in choice.release_reports()] == [(0, ord("x"))]
    assert choice.release_reports() == []
    assert choice.take(output_of(choice, "q")) == "ENq"
    assert [r.token_id for r in choice.release_reports()] == list(b"ENq")


def test_reports_of_cut_text_are_dropped():
    choice = choice_of(query_of(params={"stop": ("END",), "logprobs": 0}))
    assert choice.take(output_of(choice, "aENDb")) == "a"
    assert [r.token_id for r in choice.release_reports()] == [ord("a")]


def test_reports_of_half_characters_wait_for_the_whole():
    choice = choice_of(query_of(params={"logprobs": 0}))
    first, second = "é".encode()
    assert choice.take(output_of(choice, [first])) == ""
    assert choice.release_reports() == []
    assert choice.take(output_of(choice, [second])) == "é"
    assert [(r.offset, r.token_id) for r in choice.release_reports()] == [(0, first), (0, second)]


def test_the_first_timeline_stays():
    choice = choice_of()
    choice.take(output_of(choice, "a"))
    timeline = choice.timeline
    choice.num_tokens = 0
    choice.take(output_of(choice, "b"))
    assert choice.timeline is timeline


@pytest.mark.parametrize("logprobs", [None, 1])
@given(
    text=st.text("abé好", max_size=20),
    stops=st.lists(st.text("abé", min_size=1, max_size=3), max_size=2),
    data=st.data(),
)
def test_how_tokens_are_grouped_makes_no_difference(logprobs, text, stops, data):
    tokens = list(text.encode())
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=6).map(sorted))
    groups = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    query = query_of(params={"stop": tuple(stops), "logprobs": logprobs})
    one, many = choice_of(query), choice_of(query)
    whole = _feed(one, tokens)
    assert _feed(many, *groups) == whole
    assert (many.num_tokens, many.finish_reason) == (one.num_tokens, one.finish_reason)
    assert many.release_reports() == one.release_reports()
    assert whole == (text if one.finish_reason == "length" else text[: len(whole)])
    assert not any(stop in whole for stop in stops)
