"""`Fit` learns the coefficients of a cost that is a sum of parts, from what things really took.

    duration = coefficients[0] * x[0] + ... + coefficients[k] * x[k],   none of them negative

It is recursive least squares: a sample is added to a small matrix and forgotten again over the next
few hundred; `coefficients` solves for the best that are not negative. Errors count relatively, so
a decode step of a millisecond matters as much as a prefill of a second. What the samples do not
tell, the prior does, times whatever factor it has been wrong by on the whole.

A sample far from the errors seen so far is pulled in to three times their size, so that one stall
changes little. And what was learnt is believed only while it predicts better than the prior did
(both errors are tracked on samples not seen before): on garbage a fit is as good as its prior. It
knows neither workers nor steps; `control/cost.py` does.
"""

from collections.abc import Sequence
from math import exp, isfinite, log
from typing import Final

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

FORGETTING: Final = 0.995
"""Of each sample per later sample: the last 200 count."""
CHANGE_WEIGHT: Final = 0.2
PRIOR_WEIGHT: Final = 0.003
"""Of the prior, beside samples that weigh 1 each."""
SOLVABLE: Final = 1e-12
FLOOR: Final = 1e-4
SPREAD_START: Final = 3.0
"""Before the first sample an error of any size is believed; it is a logarithm."""
BOUND_MIN: Final = 0.3
ERROR_WEIGHT: Final = 0.05


class Fit:
    """A sum of parts with coefficients that follow the samples."""

    __slots__ = (
        "_bias",
        "_gram",
        "_learnt",
        "_log_scale",
        "_moment",
        "_spread",
        "error",
        "num_samples",
        "prior",
        "prior_error",
    )

    def __init__(self, prior: Sequence[float] | Float64) -> None:
        # A coefficient of zero would never be told from the others.
        self.prior: Float64 = np.maximum(np.array(prior, dtype=np.float64), 1e-9)
        self.num_samples = 0
        self.error = 0.0
        """Mean absolute logarithm of duration over what the fit had predicted, of late."""
        self.prior_error = 0.0
        """The same of the prior."""
        size = len(self.prior)
        self._gram: Float64 = np.zeros((size, size))
        self._moment: Float64 = np.zeros(size)
        self._learnt: Float64 = self.prior
        self._log_scale = 0.0
        self._spread = SPREAD_START
        self._bias = 0.0

    @property
    def is_trusted(self) -> bool:
        """True when the samples so far were predicted better by the fit than by the prior."""
        return self.num_samples > 0 and self.error <= self.prior_error

    @property
    def coefficients(self) -> Float64:
        """The coefficients to predict with: learnt ones, or the prior's."""
        return self._learnt if self.is_trusted else self.prior

    def predict(self, x: Sequence[float]) -> float:
        """Return the expected duration of a sum with these `x`."""
        return float(self.coefficients @ np.array(x, dtype=np.float64))

    def update(self, x: Sequence[float], duration: float) -> bool:
        """Learn from one sample; False, and nothing changed, when it can be none."""
        if not (isfinite(duration) and duration > 0 and min(x) >= 0 and max(x) > 0):
            return False
        row = np.array(x, dtype=np.float64)
        predicted = max(float(self._learnt @ row), 1e-9)
        of_prior = float(self.prior @ row)
        residual = log(duration / predicted)
        self._note_errors(abs(residual), log(duration / of_prior))
        bound = max(3 * self._spread, BOUND_MIN)
        self._spread += (min(abs(residual), bound) - self._spread) * ERROR_WEIGHT * 2
        self._bias += (min(max(residual, -bound), bound) - self._bias) * ERROR_WEIGHT * 2
        believed = predicted * exp(min(max(residual, -bound), bound))
        self._learn(row, believed, max(believed, predicted))
        return True

    def _note_errors(self, error: float, of_prior: float) -> None:
        """Average, at first over all samples there are, then over the latest."""
        self.num_samples += 1
        weight = max(ERROR_WEIGHT, 1 / self.num_samples)
        self.error += (error - self.error) * weight
        self.prior_error += (abs(of_prior) - self.prior_error) * weight
        self._log_scale += (of_prior - self._log_scale) * weight

    def _learn(self, row: Float64, duration: float, unit: float) -> None:
        """Add a sample, in units of `unit` and of the prior's coefficients, and solve."""
        parts = self.prior * row / unit
        # Errors that all lie to one side say that the past is over.
        kept = FORGETTING - CHANGE_WEIGHT * min(abs(self._bias), 1.0)
        self._gram *= kept
        self._gram += parts[:, None] * parts
        self._moment *= kept
        self._moment += parts * (duration / unit)
        self._learnt = self.prior * _solve(self._gram, self._moment, exp(self._log_scale))


def _solve(gram: Float64, moment: Float64, scale: float) -> Float64:
    """Return the least squares solution, near `scale` where the samples do not say; none negative.

    What comes out negative is set to zero, the worst first, and the rest solved again.
    """
    # The prior weighs little beside parts of the size that `scale` makes them, and never so little
    # that there is no solution.
    gram = gram.copy()
    squares = gram.ravel()[:: len(gram) + 1]  # the largest number of all is one of these
    weight = max(PRIOR_WEIGHT / scale**2, SOLVABLE * max(squares.tolist()))
    squares += weight
    moment = moment + scale * weight
    solution = np.linalg.solve(gram, moment)
    if min(solution.tolist()) >= 0:
        learnt: Float64 = np.maximum(solution, scale * FLOOR)
        return learnt
    kept = np.arange(len(gram))
    while (worst := int(solution.argmin())) >= 0 and solution[worst] < 0:
        kept = np.delete(kept, worst)
        solution = np.linalg.solve(gram[np.ix_(kept, kept)], moment[kept])
    # Next to nothing instead of nothing, so that no sum is zero.
    result = np.full(len(gram), scale * FLOOR)
    result[kept] = np.maximum(solution, scale * FLOOR)
    return result
