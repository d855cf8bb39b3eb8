"""The whole harness against a real gRPC server in another process, which measures its own delays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clients.percentiles import percentile

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def run_against(paced: list[str], load: list[str], tmp_path: Path) -> tuple[dict[str, Any], list[float]]:
    """What the load test reports, and the server's own times to the first token."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.paced_decoder", *paced],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    report = tmp_path / "report.html"
    try:
        command = (sys.executable, "-m", "clients.cli", "loadtest", "--decoder", server.stdout.readline().strip())
        flags = ("--prompts", "tokens", "--prompt-tokens", "4", "--json", "--quiet", "--html", str(report))
        done = subprocess.run([*command, *flags, *load], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        truth = json.loads(server.communicate(timeout=60)[0])
    finally:
        server.kill()
        server.wait()
    assert "<svg" in report.read_text()
    return json.loads(done.stdout), truth


@pytest.mark.slow
def test_percentiles_are_within_2_percent_also_over_a_stall_of_5_s(tmp_path: Path) -> None:
    paced = ["--ttft", "1.0", "--itl", "0.1", "--tokens", "5", "--stall", "4", "9"]
    load = ["--rate", "20", "--arrivals", "constant", "--duration", "14", "--output-tokens", "5"]
    for _ in range(3):
        result, truth = run_against(paced, load, tmp_path)
        if not result["client"]["was_the_limit"]:  # it says itself when its figures are those of a busy machine
            break
    latency = result["latency_s"]
    assert latency["ttft"]["count"] == len(truth)
    for name, share in SHARES.items():
        assert latency["ttft"][name] == pytest.approx(percentile(truth, share), rel=0.02)
    assert latency["ttft"]["p99"] > 4.5
    assert latency["itl"]["p50"] == pytest.approx(0.1, rel=0.02)


def test_a_run_over_grpc_ends_with_figures_and_a_report(tmp_path: Path) -> None:
    paced = ["--ttft", "0.02", "--itl", "0.005", "--tokens", "4"]
    load = ["--rate", "50", "--duration", "1", "--output-tokens", "4"]
    result, truth = run_against(paced, load, tmp_path)
    latency = result["latency_s"]
    assert latency["ttft"]["count"] == len(truth) > 20
    assert latency["itl"]["count"] == 3 * len(truth)
