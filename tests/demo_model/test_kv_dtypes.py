"""What rounding K/V costs the demo model; `python -m tests.bench.kv_accuracy` gives the figures of many probes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

from services.decoder.ops.native import why_unavailable
from tests.bench.kv_accuracy import Demo, measure


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_s20_int8_kv_answers_every_task_as_bf16_does(tmp_path: Path, layout: str) -> None:
    demo = Demo("mlx" if why_unavailable() else "native", "exact", tmp_path)
    bf16, int8 = measure(demo, 4, ["bf16", "int8"], layout)
    assert set(bf16["accuracy"].values()) == set(int8["accuracy"].values()) == {100.0}
    assert 0 < bf16["kl_mean"] < int8["kl_mean"] < 1e-6
