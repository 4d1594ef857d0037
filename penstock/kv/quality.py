"""What a lossy codec may cost, and whether it does: the quality budget.

Owns the budget, how it is written on a command line, and the verdict on a codec that was measured
on a model. Does not know how that is measured (`penstock/engine/kv_quality.py`). Whoever loads a
model asks for a verdict on each codec that it would use and keeps those that are admitted; the
`loss` of a codec's `CodecSpec` is `charged_loss`.
"""

from typing import Final

from msgspec import Struct

EXACT: Final = "exact"
LOSS_MIN: Final = 1e-6
"""What a lossy codec is charged at least. On a short text chance may lower the loss, and a budget
of nothing must still refuse it."""

NUM_ERRORS: Final = 2.0
"""Standard errors that are added to what was measured before it is held against the budget."""


class KvQuality(Struct, frozen=True):
    """How much worse a model may get. The default is not at all: blocks come back bit for bit."""

    loss_max: float = 0.0
    """Relative increase of the held-out loss: 0.001 is 0.1 %."""
    agreement_min: float = 0.0
    """Share of the positions at which the most likely token must stay the same, 0 to 1."""

    @property
    def is_exact(self) -> bool:
        """True when nothing lossy is admitted."""
        return self.loss_max < LOSS_MIN


class Measured(Struct, frozen=True):
    """What a codec was found to do to a model."""

    loss_increase: float
    greedy_agreement: float
    loss_error: float = 0.0
    """Standard error of the increase: how far the luck of a short text may be off."""

    @property
    def loss_bound(self) -> float:
        """What the increase is at most, as far as two standard errors tell."""
        return self.loss_increase + NUM_ERRORS * self.loss_error


def parse_quality(text: str) -> KvQuality:
    """Read `--kv-quality`: "exact", or the loss that is allowed as "0.5%" or "0.005".

    After a comma may follow the least agreement of greedy tokens: "0.5%,98%".
    Raises: `ValueError` for anything else.
    """
    if text == EXACT:
        return KvQuality()
    loss, comma, agreement = text.partition(",")
    quality = KvQuality(_share(loss), _share(agreement) if comma else 0.0)
    if not (0 <= quality.loss_max <= 1 and 0 <= quality.agreement_min <= 1):
        raise ValueError(f"{text!r}: shares are between 0 and 1, or 0% and 100%")
    return quality


def charged_loss(measured: Measured | None) -> float:
    """Return the loss that a codec is charged with; None stands for a lossless one.

    It is the upper end of what was measured: what a short text did not show may still be there.
    """
    return 0.0 if measured is None else max(measured.loss_bound, LOSS_MIN)


def refusal(quality: KvQuality, name: str, measured: Measured | None) -> str | None:
    """Return why a codec is not to be used on this model, or None when it may be.

    `measured` is None for a lossless codec, which is always admitted. What is not a number exceeds
    every budget.
    """
    if measured is None:
        return None
    if quality.is_exact:
        return exact_refusal(name)
    # Written so that a NaN is refused.
    if not charged_loss(measured) <= quality.loss_max:
        return (
            f"{name} raises this model's loss by {measured.loss_increase:.3%} (at most "
            f"{measured.loss_bound:.3%}), and --kv-quality allows {quality.loss_max:.3%}"
        )
    if not measured.greedy_agreement >= quality.agreement_min:
        return (
            f"with {name} only {measured.greedy_agreement:.2%} of this model's greedy tokens stay "
            f"the same, and --kv-quality asks for {quality.agreement_min:.2%}"
        )
    return None


def exact_refusal(name: str) -> str:
    """Return why a lossy codec is not to be used where blocks must come back bit for bit."""
    return f"{name} is lossy, and --kv-quality is {EXACT}"


def _share(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(
            f'{text!r} is no share: write "{EXACT}", "0.5%" or "0.005", and perhaps ",98%"'
        ) from None
