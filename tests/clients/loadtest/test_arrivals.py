"""Schedules of an open loop: how many requests are due, and when."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.loadtest.arrivals import PATTERNS, Arrivals
from clients.loadtest.lengths import SpecError, parse_numbers, parse_shares, pick


def times(pattern: str, rates: list[float], duration_s: float = 100.0, burst_size: int = 1) -> list[float]:
    return list(Arrivals(pattern, rates, duration_s, burst_size).times(random.Random(1)))


def test_constant_arrivals_are_evenly_spaced() -> None:
    due = times("constant", [4.0], 10.0)
    assert due == pytest.approx([number / 4 for number in range(40)])


def test_poisson_arrivals_have_the_rate_and_the_spread() -> None:
    due = times("poisson", [50.0], 200.0)
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert len(due) == pytest.approx(10_000, rel=0.03)
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.05)  # as of an exponential distribution


def test_a_ramp_grows_evenly() -> None:
    due = times("ramp", [0.0, 100.0])
    assert len(due) == pytest.approx(5000, rel=0.05)
    assert sum(at < 50 for at in due) == pytest.approx(1250, rel=0.1)
    falling = times("ramp", [100.0, 0.0])
    assert sum(at < 50 for at in falling) == pytest.approx(3750, rel=0.1)


def test_steps_share_the_time() -> None:
    due = times("step", [10.0, 0.0, 40.0], 30.0)
    parts = [sum(low <= at < low + 10 for at in due) for low in (0, 10, 20)]
    assert parts[1] == 0
    assert parts[0] == pytest.approx(100, rel=0.3)
    assert parts[2] == pytest.approx(400, rel=0.2)


def test_bursts_come_all_at_once() -> None:
    due = times("bursts", [10.0], 2.0, burst_size=5)
    assert due == [0.0] * 5 + [0.5] * 5 + [1.0] * 5 + [1.5] * 5


@given(
    pattern=st.sampled_from(PATTERNS),
    first=st.floats(0.1, 50),
    last=st.floats(0.1, 50),
    duration_s=st.floats(0.1, 20),
    burst_size=st.integers(1, 9),
)
def test_times_never_fall_and_stay_within(
    pattern: str, first: float, last: float, duration_s: float, burst_size: int
) -> None:
    rates = [first, last] if pattern in ("ramp", "step") else [first]
    due = times(pattern, rates, duration_s, burst_size)
    assert due == sorted(due)
    assert all(0 <= at < duration_s for at in due)


@pytest.mark.parametrize(
    ("pattern", "rates"), [("ramp", [1.0]), ("poisson", [1.0, 2.0]), ("constant", [0.0]), ("x", [1.0])]
)
def test_nonsense_is_refused(pattern: str, rates: list[float]) -> None:
    with pytest.raises(SpecError, match="--"):
        Arrivals(pattern, rates, 1.0)


def test_numbers_are_fixed_uniform_or_listed(tmp_path: Path) -> None:
    rng = random.Random(1)
    assert parse_numbers("128").draw_whole(rng, 0) == 128
    drawn = {parse_numbers("3-5").draw_whole(rng, 0) for _ in range(100)}
    assert drawn == {3, 4, 5}
    listed = tmp_path / "lengths"
    listed.write_text("7\n\n# a comment\n9 # another\n")
    numbers = parse_numbers(f"@{listed}")
    assert [numbers.draw_whole(rng, index) for index in range(4)] == [7, 9, 7, 9]


@pytest.mark.parametrize("text", ["", "x", "5-3", "@/nowhere", "-1"])
def test_bad_numbers_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_numbers(text)


def test_shares() -> None:
    assert parse_shares("batch=0.25") == ("batch", 0.25)
    for text in ("batch", "=0.5", "a=2", "a=x"):
        with pytest.raises(SpecError):
            parse_shares(text)
    rng = random.Random(1)
    picked = [pick([("a", 0.2), ("b", 0.3)], rng, "rest") for _ in range(2000)]
    assert picked.count("a") == pytest.approx(400, rel=0.2)
    assert picked.count("rest") == pytest.approx(1000, rel=0.1)
