"""The kernels on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.decoder.ops.cuda.driver import CudaDriver, CudaError
from tests.decoder.cuda import checks

_MODEL = Path(__file__).parents[3] / "services/decoder/demo_model/checkpoint"


def test_everything_that_must_hold_of_the_kernels() -> None:
    try:
        CudaDriver()
    except CudaError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    failed = [words for words, holds in checks.run(_MODEL) if not holds]
    assert not failed
