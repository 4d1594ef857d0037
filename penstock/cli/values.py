"""Values on the command line: parsed and checked, with words for who mistyped one."""

import argparse

from penstock.kv.quality import KvQuality, parse_quality
from penstock.kv.tiers import RAW
from penstock.runtime.settings import AUTO, TierSettings

TIER_CODECS = (RAW, "lossless", "fp8", "int8", "int4", "sparse", AUTO)
"""What may be said of how blocks lie in a tier."""

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def parse_bytes(text: str) -> int:
    """Return a number of bytes: `1GiB`, `512MiB`, `1.5g`, `1000000`.

    Raises: `argparse.ArgumentTypeError` for anything else.
    """
    lower = text.strip().lower()
    number = lower.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = lower[len(number) :].strip().removesuffix("b")
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1GiB") from None
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is too small")
    return size


def positive(text: str) -> int:
    """Return a number from 1 on. Raises: `argparse.ArgumentTypeError`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def count(text: str) -> int:
    """Return a number of workers. Raises: `argparse.ArgumentTypeError`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers")
    return int(text)


def seconds(text: str) -> float:
    """Return a number of seconds. Raises: `argparse.ArgumentTypeError`."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return number


def share(text: str) -> float:
    """Return a part of a whole, above 0 and at most 1. Raises: `argparse.ArgumentTypeError`."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part of a whole, such as 0.9")
    return number


def port(text: str) -> int:
    """Return a port. Raises: `argparse.ArgumentTypeError`."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def milliseconds(text: str) -> float:
    """Return a time above 0 in milliseconds. Raises: `argparse.ArgumentTypeError`."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds")
    return number


def kv_tier(text: str) -> TierSettings:
    """Return a tier: `dram=8GiB`, `cxl=4GiB` or `disk=/path,100GiB`, perhaps with `,codec=int8`.

    Raises: `argparse.ArgumentTypeError`.
    """
    name, _, rest = text.partition("=")
    rest, _, codec = rest.partition(",codec=")
    path, _, size = rest.rpartition(",")
    if name not in ("dram", "cxl", "disk") or (name == "disk") != bool(path):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a tier such as dram=8GiB, disk=/path,100GiB or dram=8GiB,codec=int8"
        )
    if codec not in ("", *TIER_CODECS):
        raise argparse.ArgumentTypeError(f"{codec!r} is no codec: one of {', '.join(TIER_CODECS)}")
    return TierSettings(name=name, num_bytes=parse_bytes(size), path=path, codec=codec)


def kv_quality(text: str) -> KvQuality:
    """Return a quality budget: `exact`, `0.1%`, or `0.1%,99%`.

    Raises: `argparse.ArgumentTypeError`.
    """
    try:
        return parse_quality(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
