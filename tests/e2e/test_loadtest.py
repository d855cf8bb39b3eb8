"""The load test checks a real system in a minute: every answer right, through cancellations and a decoder's death."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core")

_UP = (
    "--up",
    "--model",
    "demo",
    "--backend",
    "mlx",
    "--num-blocks",
    "1024",
    "--manager-port",
    "0",
    "--decoder-port",
    "0",
)


def loadtest(*flags: str) -> dict[str, Any]:
    """The figures of a run that had to end with 0: nothing failed, nothing wrong, no lease left."""
    done = subprocess.run(
        [sys.executable, "-m", "clients.cli", "loadtest", *_UP, "--json", "--quiet", *flags],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def test_a_closed_loop_with_shared_prefixes_and_turns_has_every_answer_right() -> None:
    flags = "--users 8 --duration 5 --turns 2 --shared-prefix 40 --prefixes 2 --tasks recall,lookup"
    summary = loadtest(*flags.split())
    assert summary["requests"]["checked"] == summary["requests"]["ok"] > 0
    assert summary["pool"]["peak_in_use"] > 0


def test_an_open_loop_survives_cancellations_and_a_decoder_kill(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    flags = "--decoders 2 --rate 4 --duration 8 --cancel-share 0.2 --chaos 2:kill:decoder-1,4:start:decoder-1 --html"
    summary = loadtest(*flags.split(), str(report))
    assert summary["requests"]["checked"] == summary["requests"]["ok"] > 0
    assert summary["statuses"]["cancelled as planned"] > 0
    assert "kill decoder-1" in report.read_text()


def test_sampled_streams_are_the_same_alone_and_in_a_crowd() -> None:
    flags = "--users 8 --duration 4 --prompts tokens --prompt-tokens 5-60 --output-tokens 8-24 --temperature 0.9"
    summary = loadtest(*flags.split(), "--verify", "recorded", "--distinct", "6")
    assert summary["requests"]["checked"] == summary["requests"]["ok"] > 6
