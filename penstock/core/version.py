"""The version of the program, where every floor can read it; `pyproject.toml` says the same."""

from typing import Final

VERSION: Final = "0.1.0"
