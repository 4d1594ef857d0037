"""Penstock serves large language models with prefill and decode on separate workers.

>>> from penstock import LLM, SamplingParams
>>> with LLM() as llm:
...     outputs = llm.generate("Once upon a time", SamplingParams(max_tokens=32))
"""

from typing import TYPE_CHECKING

from penstock.core.version import VERSION as __version__

if TYPE_CHECKING:
    from penstock.core.request import SamplingParams
    from penstock.llm import LLM, RequestOutput

__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Import the Python API when it is first asked for: `import penstock` alone stays light."""
    if name in ("LLM", "RequestOutput"):
        from penstock import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from penstock.core.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
