"""Charts as inline SVG. Colours come from the page's style sheet, so that they follow its light and dark schemes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from clients.loadtest.records import Mark
from clients.percentiles import percentile

WIDTH, HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 20, 12, 26
MAX_POINTS = 3000  # a browser draws more only slowly, and nobody sees them

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One named line, band or cloud; `colour` is a number from 1 to 6."""

    name: str
    colour: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """The range of one axis and where its ticks are: (value, label)."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1; beyond the ends it is put at the end."""
        if self.log:
            value, low, high = math.log10(max(value, self.low)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))


def linear_axis(high: float, unit: str = "", low: float = 0.0) -> Axis:
    """An axis from low to a round number that is at least high."""
    span = max(high - low, 1e-9)
    step = _nice(span / 5)
    count = max(1, math.ceil(span / step - 1e-9))
    ticks = [(low + step * number, _label(low + step * number, step, unit)) for number in range(count + 1)]
    return Axis(low, low + step * count, ticks)


def time_axis(end_s: float) -> Axis:
    """An axis of seconds that ends where the run ended."""
    round_axis = linear_axis(end_s, " s")
    return Axis(0.0, end_s, [tick for tick in round_axis.ticks if tick[0] <= end_s])


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis of seconds over whole decades."""
    first, last = math.floor(math.log10(max(low, 1e-6))), math.ceil(math.log10(max(high, 1e-5)))
    last = max(last, first + 1)
    ticks = [(10.0**power, _seconds_label(power)) for power in range(first, last + 1)]
    return Axis(10.0**first, 10.0**last, ticks, log=True)


def line_chart(series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[Mark] = ()) -> str:
    """Lines over time, with marks as dashed verticals."""
    body = "".join(_polyline(one, x, y) for one in series)
    return _chart(body, x, y, marks, series)


def scatter_chart(series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[Mark] = ()) -> str:
    """A dot for each point; of too many, the highest of each stretch are kept, because those are what one looks for."""
    body = "".join(
        f'<circle class="f{one.colour}" cx="{_x(x, px):.1f}" cy="{_y(y, py):.1f}" r="2"/>'
        for one in series
        for px, py in thin(one.points)
    )
    return _chart(body, x, y, marks, series)


def stacked_chart(series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[Mark] = ()) -> str:
    """Bands on top of one another, the first at the bottom; all series have the same times."""
    count = len(series[0].points) if series else 0
    keep = range(0, count, max(1, count // MAX_POINTS))
    base = [0.0] * count
    body = ""
    for one in series:
        top = [low + value for low, (_, value) in zip(base, one.points, strict=True)]
        edge = [f"{_x(x, one.points[i][0]):.1f},{_y(y, top[i]):.1f}" for i in keep]
        edge += [f"{_x(x, one.points[i][0]):.1f},{_y(y, base[i]):.1f}" for i in reversed(keep)]
        body += (
            f'<polygon class="f{one.colour} band" points="{" ".join(edge)}"><title>{escape(one.name)}</title></polygon>'
        )
        base = top
    return _chart(body, x, y, marks, series)


def percentile_chart(series: Sequence[tuple[str, int, Sequence[float]]]) -> str:
    """Each distribution from its median outwards: the share on an axis of nines, seconds on a logarithmic one."""
    drawn = []
    for name, colour, values in series:
        ordered = sorted(values)
        # A percentile needs as many values as its share leaves out one of.
        shares = [share for share in _PERCENTILES if (1 - share) * len(ordered) >= 1 - 1e-9]
        points = [(_nines(share), max(percentile(ordered, share), 1e-6)) for share in shares]
        if points:
            drawn.append(Series(name, colour, points))
    if not drawn:
        return ""
    heights = [value for one in drawn for _, value in one.points]
    end = max(max(at for one in drawn for at, _ in one.points), _nines(0.9))
    ticks = [(_nines(share), f"p{share * 100:g}") for share in (0.5, 0.75, 0.9, 0.99, 0.999, 0.9999)]
    x = Axis(_nines(0.5), end, [tick for tick in ticks if tick[0] <= end + 1e-9])
    return line_chart(drawn, x, log_axis(min(heights), max(heights)))


_PERCENTILES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)


def _nines(share: float) -> float:
    return -math.log10(1 - share)


def steps(points: Sequence[Point]) -> list[Point]:
    """The corners of a line that keeps each value until the next one."""
    corners: list[Point] = []
    for at, value in points:
        if corners:
            corners.append((at, corners[-1][1]))
        corners.append((at, value))
    return corners


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """At most about MAX_POINTS of the points: the highest one of each equal stretch."""
    stride = math.ceil(len(points) / MAX_POINTS) if points else 1
    if stride <= 1:
        return points
    return [max(points[i : i + stride], key=lambda point: point[1]) for i in range(0, len(points), stride)]


def binned(values: Sequence[Point], end_s: float, bins: int, fold: Callable[[list[float]], float]) -> list[Point]:
    """(time, value) pairs folded into equal stretches of time; each stretch is told at its middle."""
    width = max(end_s, 1e-9) / bins
    folded: list[list[float]] = [[] for _ in range(bins)]
    for time_s, value in values:
        folded[min(max(int(time_s / width), 0), bins - 1)].append(value)
    return [((number + 0.5) * width, fold(found)) for number, found in enumerate(folded)]


def _chart(body: str, x: Axis, y: Axis, marks: Sequence[Mark], series: Sequence[Series]) -> str:
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{_y(y, value):.1f}" y2="{_y(y, value):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{_y(y, value) + 3.5:.1f}" text-anchor="end">{escape(label)}</text>'
        for value, label in y.ticks
    )
    grid += "".join(
        f'<text class="tick" x="{_x(x, value):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(label)}</text>'
        for value, label in x.ticks
    )
    lines = "".join(
        f'<g class="mark"><line x1="{_x(x, mark.time_s):.1f}" x2="{_x(x, mark.time_s):.1f}" y1="{_TOP}" '
        f'y2="{HEIGHT - _BOTTOM}"/><text x="{_x(x, mark.time_s) + 3:.1f}" y="{_TOP + 9 + 11 * (number % 3)}">'
        f"{escape(mark.text)}</text></g>"
        for number, mark in enumerate(marks)
    )
    legend = "".join(f'<span><i class="b{one.colour}"></i>{escape(one.name)}</span>' for one in series)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{grid}{body}{lines}</svg>'
        f'<div class="legend">{legend if len(series) > 1 else ""}</div>'
    )


def _polyline(series: Series, x: Axis, y: Axis) -> str:
    """The line of a series, broken where a value is missing (NaN)."""
    pieces: list[list[str]] = [[]]
    for px, py in thin(series.points):
        if math.isnan(py):
            pieces.append([])
        else:
            pieces[-1].append(f"{_x(x, px):.1f},{_y(y, py):.1f}")
    return "".join(
        f'<polyline class="s{series.colour}" points="{" ".join(piece)}"><title>{escape(series.name)}</title></polyline>'
        for piece in pieces
        if piece
    )


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def _label(value: float, step: float, unit: str) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}{unit}"


def _seconds_label(power: int) -> str:
    if power >= 0:
        return f"{10**power} s"
    if power >= -3:
        return f"{10 ** (power + 3)} ms"
    return f"{10 ** (power + 6)} µs"
