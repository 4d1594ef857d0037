"""How a request's workers are chosen: one rule a file, all behind `Policy`.

`predicted` is ours; the others are the classic ones, for comparison on the same ground: they see
the same books and the same open workers, and are booked and explained alike.
"""

from typing import Final

from penstock.control.policies.arrow import arrow
from penstock.control.policies.classic import (
    least_loaded,
    power_of_two,
    prefix_aware,
    round_robin,
)
from penstock.control.policies.policy import Ask, Choice, Policy
from penstock.control.policies.predicted import predicted

POLICIES: Final[dict[str, Policy]] = {
    "predicted": predicted,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "prefix_aware": prefix_aware,
    "power_of_two": power_of_two,
    "arrow": arrow,
}
"""By the name that `--policy` takes."""

USES_PREFIXES: Final = frozenset({"predicted", "prefix_aware"})
"""Policies that ask who has which blocks; for the others nobody is asked."""

USES_DRAWS: Final = frozenset({"power_of_two"})
"""Policies that look at `Ask.draw`; for the others it is 0."""

HOLDS_BACK: Final = frozenset({"predicted"})
"""Policies that leave a request at the controller until a worker is open for it. The others push,
as they do elsewhere: a request goes to a worker's own queue at once.
"""

__all__ = ["HOLDS_BACK", "POLICIES", "USES_DRAWS", "USES_PREFIXES", "Ask", "Choice", "Policy"]
