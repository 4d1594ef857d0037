"""Whole models, alone and in two processes: `models.py` and `disaggregated.py`.

Both need the engine on CUDA; where that cannot be imported they are named with the reason.
"""

from __future__ import annotations

from h200.lab import Absent, Lab, Measure

try:
    from h200 import disaggregated, models
except ImportError as error:
    REASON = str(error)

    def absent(_lab: Lab) -> None:
        """Say what is missing."""
        raise Absent(f"the engine on CUDA cannot be imported: {REASON}")

    CHECKS: tuple[Measure, ...] = ()
    MEASURES: tuple[Measure, ...] = (Measure("whole models", absent),)
else:
    CHECKS = (*models.CHECKS, *disaggregated.CHECKS)
    MEASURES = (*models.MEASURES, *disaggregated.MEASURES)
