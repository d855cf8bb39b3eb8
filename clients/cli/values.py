"""Types of command-line values, each of which says what it takes when it refuses one."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from clients.channel import check_target
from clients.errors import BadTargetError

MAX_SEED = 2**64 - 1
MAX_TOKEN_ID = 2**32 - 1

_SIZE_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"^(?P<number>\d+) ?(?P<unit>|[kmg]i?b)$", re.IGNORECASE)


def target(text: str) -> str:
    """HOST:PORT or unix:PATH."""
    try:
        return check_target(text)
    except BadTargetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A parser of numbers from low to high; `above` leaves low itself out."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high:
            bounds = f"above {low:g}" if above else f"of at least {low:g}"
            upper = "" if math.isinf(high) else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}{upper}")
        return value

    return parse


def size(text: str) -> int:
    """A number of bytes, with or without a suffix such as MiB or GB."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write a number of bytes, or one such as 200MiB")
    return int(match["number"]) * _SIZE_UNITS[match["unit"].lower()]


def seconds(text: str) -> float:
    """A duration in seconds, 0 or more."""
    return number(0, 1e9)(text)


def token_ids(text: str) -> list[int]:
    """Token ids with commas between them."""
    parse = whole(0, MAX_TOKEN_ID)
    try:
        return [parse(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; write token ids as 1,2,3") from error


def folder(text: str) -> Path:
    """A folder that exists."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder; give one that exists")
    return path.resolve()
