"""A few seeds of chaos on every run, and more in the long one; `python -m tests.chaos` runs any number."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

from tests.chaos.host import Serving
from tests.chaos.oracle import Expected, undisturbed, write_model
from tests.chaos.plan import Kind, make_plan
from tests.chaos.run import run_seed

QUICK = range(3)
LONG = range(3, 23)


@dataclass(frozen=True)
class Setting:
    """What all seeds share."""

    serving: Serving
    expected: list[Expected]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    directory = tmp_path_factory.mktemp("chaos")
    serving = Serving(write_model(directory / "model"), "mlx")
    return Setting(serving, asyncio.run(undisturbed(directory / "undisturbed", serving)))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for sockets, whose paths have a limit."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        yield Path(directory)


@pytest.mark.parametrize("seed", [*QUICK, *(pytest.param(seed, marks=pytest.mark.slow) for seed in LONG)])
async def test_after_any_faults_streams_are_exact_and_every_block_is_back(
    setting: Setting, short_path: Path, seed: int
) -> None:
    report = await run_seed(make_plan(seed), short_path, setting.serving, setting.expected)
    print(report)
    assert not report.problem


def test_a_seed_always_means_the_same_plan_and_the_seeds_together_mean_every_fault() -> None:
    plans = [make_plan(seed) for seed in LONG]
    assert plans == [make_plan(seed) for seed in LONG]
    assert {fault.kind for plan in plans for fault in plan.faults} == set(Kind)
