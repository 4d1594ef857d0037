"""Which of Hugging Face's implementations computes a mixture of experts.

Owns that choice. `grouped_mm` sorts tokens by expert and multiplies all experts at once, with
nothing read back from the device, so it can be in a CUDA graph; `eager` loops over experts and
waits for the device. `lift` asks before it takes such a block as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from penstock.engine.hugging_face import HfModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPED: Final = "grouped_mm"
EAGER: Final = "eager"


def choose_experts(model: PreTrainedModel) -> str:
    """Set a model's experts to `grouped_mm` where torch and the model know it, else to `eager`.

    Returns which it is. A model without experts is left alone.
    """
    with_experts: HfModule = model
    try:
        with_experts.set_experts_implementation(GROUPED)
    except (ValueError, ImportError):
        # The model computes experts in its own code, or torch has no grouped products.
        return EAGER
    return GROUPED
