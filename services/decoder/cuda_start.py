"""What must hold before the cuda backend may touch a GPU. Nothing here initialises CUDA."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

from services.decoder.errors import ConfigError

_DISTRIBUTIONS = ("mlx-cuda-13", "mlx-cuda-12")
_MPS_DIRECTORY = Path("/tmp/nvidia-mps")  # where its daemon listens unless CUDA_MPS_PIPE_DIRECTORY says otherwise


def why_no_mlx_for_cuda() -> str:
    """Empty where MLX's CUDA build is installed. Importing it would initialise CUDA."""
    for name in _DISTRIBUTIONS:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return ""
    return "MLX for CUDA is not installed; pip install 'leasehold[decoder-cuda]'"


def refuse_mps(environ: Mapping[str, str] = os.environ, directory: Path = _MPS_DIRECTORY) -> None:
    """Raises ConfigError under NVIDIA's MPS: its server runs the kernels, and goes on when this process is dead."""
    named = environ.get("CUDA_MPS_PIPE_DIRECTORY")
    if named is None and not (directory / "control").exists():
        return
    where = f"CUDA_MPS_PIPE_DIRECTORY is {named!r}" if named is not None else f"its daemon listens in {directory}"
    raise ConfigError(
        f"--backend cuda: NVIDIA MPS is on here ({where}). Under it the death of a process does not prove that its kernels have ended,"
        " so that its blocks could not be handed on safely; stop it (echo quit | nvidia-cuda-mps-control), and unset the variable"
    )
