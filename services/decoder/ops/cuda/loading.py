"""Loads a model into the kernels that take it."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import structlog

from services.decoder.errors import CheckpointError
from services.decoder.loader import Checkpoint
from services.decoder.model_config import ModelConfig
from services.decoder.models import Model, load_model
from services.decoder.ops.base import Ops
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.ops.cuda.fast import FastKernels
from services.decoder.ops.cuda.ops import CudaOps
from services.decoder.ops.cuda.plain import PlainKernels

PRECISIONS = ("bf16", "f32")
_log = structlog.get_logger(__name__)


def load(checkpoint: Checkpoint, config: ModelConfig, precision: str, device: int = 0) -> tuple[Model, Ops]:
    """Reads the weights into GPU memory; raises CheckpointError for what no kernels take, and CudaError without a GPU.

    `bf16` takes the fast kernels where they fit, and otherwise, like `f32`, the plain ones, whose activations are float32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    driver = CudaDriver(device)
    if precision == "bf16":
        try:
            return _load(checkpoint, config, CudaOps(FastKernels(), driver))
        except CheckpointError as error:
            reason = str(error).partition(", which the cuda backend")[0].partition("; use --backend")[0]
            _log.warning("plain_kernels", why=reason, means="float32 activations, several times slower than bf16 ones")
    return _load(checkpoint, config, CudaOps(PlainKernels(), driver))


def kernel_cache_dir() -> Path:
    """Where MLX keeps compiled kernels: the next process does not compile them again."""
    configured = os.environ.get("MLX_PTX_CACHE_DIR")
    return Path(configured) if configured else Path(tempfile.gettempdir()) / "mlx" / version("mlx") / "ptx"


def _load(checkpoint: Checkpoint, config: ModelConfig, ops: CudaOps) -> tuple[Model, Ops]:
    if config.attention_bias and isinstance(ops.kernels, FastKernels):
        raise CheckpointError(
            "attention_bias: linear layers have a bias, which the cuda backend's fast kernels do not take"
        )
    if not all(config.moe_layers) and isinstance(ops.kernels, FastKernels):
        raise CheckpointError("mlp_only_layers: a layer is dense, which the cuda backend's fast kernels do not take")
    model = load_model(checkpoint, config, ops)
    ops.check_loaded()
    return model, ops
