"""`Columns`: numbers of all workers, a row of one table each, for a router that looks at all.

Hardly any of a routing decision is arithmetic, it is calls: so numbers that are only ever added up
with weights are neighbours, and one product, and what is written for one worker goes through
memoryviews, which take half of numpy's time. What the numbers mean is the fleet's affair
(`control/fleet.py`), which writes them.
"""

from typing import Final

import numpy as np

from penstock.control.fit import Float64

SCRATCH_ROWS: Final = 3
SCRATCH_NUMBERS: Final = 3

_COEFFICIENTS: Final = ("a", "b", "c", "d", "e", "f")
_LANDING: Final = ("f", "step", "fresh", "arriving", "decode_closed")
_PREFILLS: Final = ("backlog_least", "free_at", "prefill_tokens", "spare_at")
_DECODES: Final = ("arriving", "step", "seats", "kv_free", "decode_tokens")
_DOORS: Final = (
    "prefill_barred",
    "prefill_closed",
    "decode_closed",
    "alone_closed",
    "alone_charge",
)
_NAMES: Final = tuple(dict.fromkeys(_COEFFICIENTS + _LANDING + _PREFILLS + _DECODES + _DOORS))


class Columns:
    """Columns are float64, [num_slots]; those that are read together are [columns, num_slots].

    `coefficients` are as in `control/cost.py`, and `rows` are its rows. `prefill_books` and
    `decode_books` are the cells of what changes with every request, in the order of `_PREFILLS` and
    `_DECODES`. `fresh` is a policy's own: the tokens of a prompt that each slot does not have.
    `scratch` is room for [num_slots] at a time and `numbers` for one, which numpy takes several
    times as fast out of arrays without dimensions as it takes Python's: nothing is allocated for
    what a policy works out on its way.
    """

    arriving: Float64
    fresh: Float64
    backlog_least: Float64
    free_at: Float64
    spare_at: Float64
    step: Float64
    seats: Float64
    kv_free: Float64
    prefill_closed: Float64
    prefill_barred: Float64
    decode_closed: Float64
    alone_closed: Float64
    prefill_tokens: Float64
    decode_tokens: Float64
    alone_charge: Float64

    def __init__(self) -> None:
        self._table: Float64 = np.zeros((len(_NAMES), 0))
        self.numbers: tuple[Float64, ...] = tuple(np.empty(()) for _ in range(SCRATCH_NUMBERS))
        self.zero: Float64 = np.zeros(())
        self._weights: Float64 = np.ones(len(_LANDING))
        self._weight_cells = _cells(self._weights)
        self.resize(0)

    def resize(self, num_slots: int) -> None:
        """Have so many slots; the new ones are all zero."""
        old = self._table
        self._table = np.zeros((len(_NAMES), num_slots))
        self._table[:, : old.shape[1]] = old
        for name in ("fresh", *_PREFILLS, *_DECODES, *_DOORS):
            setattr(self, name, self._row(name))
        self.coefficients = self._rows(_COEFFICIENTS)
        self.rows: tuple[Float64, ...] = tuple(self.coefficients)
        self._landing = self._rows(_LANDING)
        self.prefill_books = tuple(_cells(self._row(name)) for name in _PREFILLS)
        self.decode_books = tuple(_cells(self._row(name)) for name in _DECODES)
        self.scratch: tuple[Float64, ...] = tuple(np.empty((SCRATCH_ROWS, num_slots)))

    def weigh_landing(
        self, per_context: float, per_step: float, per_fresh: float, per_byte: float
    ) -> Float64:
        """Return the sum of a step's context, the step, what is `fresh` and what is arriving, with
        these weights, and of `decode_closed`, [num_slots].
        """
        weights = self._weight_cells
        weights[0], weights[1], weights[2], weights[3] = per_context, per_step, per_fresh, per_byte
        total: Float64 = np.dot(self._weights, self._landing)
        return total

    def _row(self, name: str) -> Float64:
        row: Float64 = self._table[_NAMES.index(name)]
        return row

    def _rows(self, names: tuple[str, ...]) -> Float64:
        first = _NAMES.index(names[0])
        assert _NAMES[first : first + len(names)] == names, names
        return self._table[first : first + len(names)]


def _cells(column: Float64) -> "memoryview[float]":
    return column.data.cast("B").cast("d")
