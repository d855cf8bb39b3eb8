"""A few seeds of chaos on every run, and more in the long one; `python -m tests.chaos` runs any number."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
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
from tests.e2e.processes import ROOT, until

QUICK = range(3)
LONG = range(3, 23)


@dataclass(frozen=True)
class Setting:
    """What all seeds share."""

    serving: Serving
    expected: list[list[Expected]]


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


def _children(pid: int) -> set[int]:
    """The processes that a process has started and that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


@pytest.mark.parametrize(
    ("number", "num_services"),
    [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 3, marks=pytest.mark.slow)],  # while undisturbed; in a seed
)
def test_a_signal_ends_the_services_too(tmp_path: Path, number: signal.Signals, num_services: int) -> None:
    command = (sys.executable, "-m", "tests.chaos", "--seeds", "0:100", "--keep", str(tmp_path))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as harness:
        until(lambda: len(_children(harness.pid)) >= num_services, "the harness has started its services")
        services = _children(harness.pid)
        harness.send_signal(number)
        assert harness.wait(60) == 128 + number
    assert not [pid for pid in services if Path(f"/proc/{pid}").exists()]
