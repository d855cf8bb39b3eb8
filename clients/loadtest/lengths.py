"""Lengths and times that are fixed, drawn from a range, or read from a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class SpecError(ValueError):
    """A load specification that makes no sense; the message says what would."""


@dataclass(frozen=True)
class Numbers:
    """One number after another: those of `listed` in turn, or uniform from low to high."""

    low: float
    high: float
    listed: Sequence[float] = ()

    def draw(self, rng: random.Random, index: int) -> float:
        """The number for the index-th request."""
        if self.listed:
            return self.listed[index % len(self.listed)]
        return self.low if self.low == self.high else rng.uniform(self.low, self.high)

    def draw_whole(self, rng: random.Random, index: int) -> int:
        """The same as a whole number, both ends included."""
        if self.listed:
            return round(self.listed[index % len(self.listed)])
        return rng.randint(round(self.low), round(self.high))


def parse_numbers(text: str, minimum: float = 0.0) -> Numbers:
    """N, A-B or @FILE (one number a line), none below `minimum`; raises SpecError otherwise."""
    listed: list[float] = []
    try:
        if text.startswith("@"):
            lines = Path(text[1:]).expanduser().read_text().split("\n")
            listed = [float(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
            if not listed:
                raise SpecError(f"{text[1:]} holds no numbers; write one a line")
            low, high = min(listed), max(listed)
        else:
            first, dash, last = text.partition("-")
            low = float(first)
            high = float(last) if dash else low
    except (ValueError, OSError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{text!r} is no number, range or file ({error}); write 128, 64-256 or @FILE") from error
    if not minimum <= low <= high:
        raise SpecError(f"{text!r}: numbers must be at least {minimum:g} and a range must not fall")
    return Numbers(low, high, tuple(listed))


def parse_shares(text: str) -> tuple[str, float]:
    """NAME=SHARE with a share from 0 to 1; raises SpecError otherwise."""
    name, _, share_text = text.partition("=")
    try:
        share = float(share_text)
    except ValueError:
        share = -1.0
    if not name or not 0 <= share <= 1:
        raise SpecError(f"{text!r} is no share; write NAME=SHARE with a share from 0 to 1, as in batch=0.25")
    return name, share


def pick(shares: Sequence[tuple[str, float]], rng: random.Random, default: str) -> str:
    """A name drawn by share; `default` gets what the shares leave of 1."""
    mark = rng.random()
    for name, share in shares:
        if mark < share:
            return name
        mark -= share
    return default
