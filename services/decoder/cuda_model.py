"""Loads a model for the cuda backend and runs it once, so that no request waits for a compiler. On the engine's thread."""

from __future__ import annotations

import importlib
import os
from typing import Any

import structlog

from services.cuda_memory import CudaError
from services.decoder.engine_settings import EngineSettings
from services.decoder.errors import ConfigError
from services.decoder.loader import Checkpoint
from services.decoder.model_config import ModelConfig
from services.decoder.ops.base import Ops

_log = structlog.get_logger(__name__)
_BACKEND = "services.decoder.ops.cuda"
_KERNELS = {"exact": "f32", "fast": "bf16"}


def load_cuda_model(checkpoint: Checkpoint, config: ModelConfig, precision: str) -> tuple[Any, Ops]:
    """Reads the weights into GPU memory: the first thing here that initialises CUDA. Raises ConfigError without a GPU, CheckpointError."""
    if precision == "exact":
        os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it when it is first used
    try:
        loaded: tuple[Any, Ops] = importlib.import_module(f"{_BACKEND}.loading").load(
            checkpoint, config, _KERNELS[precision]
        )
    except CudaError as error:
        raise ConfigError(f"--backend: cuda finds no GPU: {error}; use --backend native or mlx") from error
    except ImportError as error:
        raise ConfigError(
            f"--backend: cuda is not available: MLX does not load ({error}); pip install 'leasehold[decoder-cuda]'"
        ) from error
    return loaded


def warm_up(model: Any, config: ModelConfig, kv_dtype: str, settings: EngineSettings) -> None:
    """Compiles every kernel that serving needs, or finds it in the cache, and runs it; the log says how far it is and where that is."""
    cache = importlib.import_module(f"{_BACKEND}.loading").kernel_cache_dir()
    _log.info("warming up: compiling kernels takes a minute or two on a fresh machine", kernel_cache=str(cache))

    def progress(what: str, seconds: float) -> None:
        _log.info("warming up", kernels=what, took_s=round(seconds, 3))

    run = importlib.import_module(f"{_BACKEND}.warm_up").warm_up
    run(
        model,
        config,
        kv_dtype,
        settings.max_seqs,
        settings.kv_capacity,
        settings.max_num_batched_tokens,
        progress,
    )
    _log.info("warm", kernel_cache=str(cache))
