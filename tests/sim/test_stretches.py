"""Draws follow each other as what was seen did, and reach all of it."""

import random
from itertools import pairwise

from penstock.sim.stretches import STRETCH, Stretches


def test_values_come_in_stretches_round_the_end() -> None:
    draws = Stretches(range(100), random.Random(1))
    drawn = [draws.draw() for _ in range(100 * STRETCH)]
    jumps = [i for i, (a, b) in enumerate(pairwise(drawn), 1) if (a + 1) % 100 != b]
    assert all(at % STRETCH == 0 for at in jumps)
    assert len(jumps) > 90
    assert set(drawn) == set(range(100))


def test_a_single_value_is_drawn_for_ever() -> None:
    draws = Stretches((7,), random.Random(0))
    assert [draws.draw() for _ in range(3 * STRETCH)] == [7] * 3 * STRETCH
