"""When requests are due in an open loop: seconds since the start, fixed before any answer comes.

The schedule is never held back by slow answers. That is the point: a user who has to wait does not keep others away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clients.loadtest.lengths import SpecError

PATTERNS = ("poisson", "constant", "ramp", "step", "bursts")


@dataclass(frozen=True)
class Arrivals:
    """A pattern over `duration_s` seconds; `rates` in requests a second, as the pattern needs them."""

    pattern: str
    rates: Sequence[float]
    duration_s: float
    burst_size: int = 1

    def __post_init__(self) -> None:
        """Raises SpecError for what cannot be scheduled."""
        if self.pattern not in PATTERNS:
            raise SpecError(f"--arrivals: {self.pattern!r} is none of {', '.join(PATTERNS)}")
        if not self.rates or any(rate < 0 for rate in self.rates) or not any(self.rates):
            raise SpecError("--rate: needs requests a second above 0")
        if self.pattern == "ramp" and len(self.rates) != 2:
            raise SpecError("--rate: a ramp needs two rates, as in 1,20")
        if self.pattern in ("poisson", "constant", "bursts") and len(self.rates) != 1:
            raise SpecError(f"--rate: {self.pattern} takes one rate; ramp and step take several")
        if self.burst_size < 1:
            raise SpecError("--burst-size: must be at least 1")

    def times(self, rng: random.Random) -> Iterator[float]:
        """The due times, never falling."""
        if self.pattern == "bursts":
            interval_s = self.burst_size / self.rates[0]
            for number in range(int(self.duration_s / interval_s) + 1):
                if number * interval_s < self.duration_s:
                    yield from [number * interval_s] * self.burst_size
            return
        # One event each time the area under the rate has grown by a step: of 1, or of an exponential variate (a Poisson
        # process, which is exact for changing rates, too).
        area = 0.0 if self.pattern == "constant" else self._step(rng)
        while (due := self._time_of_area(area)) < self.duration_s:
            yield due
            area += self._step(rng)

    def rate_at(self, time_s: float) -> float:
        """Requests a second that are due around a time."""
        if self.pattern == "ramp":
            first, last = self.rates
            return first + (last - first) * time_s / self.duration_s
        if self.pattern == "step":
            return self.rates[min(int(time_s / self.duration_s * len(self.rates)), len(self.rates) - 1)]
        return self.rates[0]

    def _step(self, rng: random.Random) -> float:
        return 1.0 if self.pattern == "constant" else rng.expovariate(1.0)

    def _time_of_area(self, area: float) -> float:
        """When the integral of the rate reaches `area`; duration_s when it does not."""
        if self.pattern == "ramp":
            return self._time_on_ramp(area)
        part_s = self.duration_s / len(self.rates)
        began_s = 0.0
        for rate in self.rates:
            if area < rate * part_s:
                return began_s + area / rate
            area -= rate * part_s
            began_s += part_s
        return self.duration_s

    def _time_on_ramp(self, area: float) -> float:
        first, last = self.rates
        slope = (last - first) / self.duration_s
        if slope == 0:
            return area / first
        # first * t + slope * t² / 2 = area, in the form that does not cancel.
        root = first * first + 2 * slope * area
        if root < 0:
            return self.duration_s
        divisor = first + root**0.5
        return 2 * area / divisor if divisor else 0.0
