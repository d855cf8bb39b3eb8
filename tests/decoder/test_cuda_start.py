"""What the cuda backend refuses before it touches a GPU; none of it needs one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.decoder.config import parse_args, resolve_backend, resolve_kv_dtype, resolve_precision
from services.decoder.cuda_start import refuse_mps, why_no_mlx_for_cuda
from services.decoder.errors import ConfigError
from tests.e2e.processes import DEMO_MODEL, ROOT


def test_mps_is_refused_because_its_server_outlives_the_process(tmp_path: Path) -> None:
    refuse_mps({}, tmp_path)
    with pytest.raises(ConfigError, match="CUDA_MPS_PIPE_DIRECTORY"):
        refuse_mps({"CUDA_MPS_PIPE_DIRECTORY": "/run/mps"}, tmp_path)
    (tmp_path / "control").touch()
    with pytest.raises(ConfigError, match="daemon listens"):
        refuse_mps({}, tmp_path)


def test_nothing_of_a_decoder_loads_mlx_before_its_lock_is_taken() -> None:
    code = "import sys, services.decoder.service; print([name for name in sys.modules if name.startswith('mlx')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_backend_names_the_extra_that_it_needs() -> None:
    if not why_no_mlx_for_cuda():
        pytest.skip("MLX for CUDA is installed here")
    with pytest.raises(ConfigError, match=r"leasehold\[decoder-cuda\]"):
        resolve_backend("cuda")


def test_the_backend_needs_a_managers_pool() -> None:
    with pytest.raises(ConfigError, match="--no-paged"):
        parse_args(["--model", str(DEMO_MODEL), "--backend", "cuda", "--no-paged"])


def test_precision_and_kv_dtype_of_the_backend() -> None:
    assert resolve_precision(None, "cuda", "bf16") == "fast"
    assert resolve_precision(None, "cuda", "f32") == "exact"
    assert resolve_kv_dtype("auto", "f32", "cuda", "exact") == "f32"
    assert resolve_kv_dtype("auto", "f16", "cuda", "fast") == "bf16"
    assert resolve_kv_dtype("f16", "f16", "cuda", "fast") == "f16"
