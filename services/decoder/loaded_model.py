"""Puts a checkpoint, a model family and a backend together, on the engine's thread."""

from __future__ import annotations

import importlib
import time

import structlog

from services.decoder.config import NATIVE_MODULE
from services.decoder.cuda_model import load_cuda_model
from services.decoder.engine import LoadedModel
from services.decoder.fingerprint import model_fingerprint
from services.decoder.leases import KvGeometry
from services.decoder.loader import Checkpoint
from services.decoder.model_config import ModelConfig
from services.decoder.models import load_model
from services.decoder.ops.base import Ops
from services.decoder.page_mapper import map_pages

_log = structlog.get_logger(__name__)


def load(
    checkpoint: Checkpoint,
    config: ModelConfig,
    kv_dtype: str,
    backend: str,
    precision: str,
    threads: int | None = None,
    kv_layout: str = "hnd",
) -> tuple[LoadedModel, Ops]:
    """Reads the weights; called on the thread that steps the model. Raises CheckpointError."""
    started = time.monotonic()
    weight_bytes = sum(path.stat().st_size for path in checkpoint.weight_files)
    _log.info("loading the model", model=str(checkpoint.directory), weight_bytes=weight_bytes)
    fingerprint = model_fingerprint(checkpoint.directory, checkpoint.weight_files)
    _log.info("the model is fingerprinted", fingerprint=fingerprint.hex(), after_s=_since(started))
    if backend == "cuda":
        model, ops = load_cuda_model(checkpoint, config, precision)
    else:
        ops = make_ops(backend, precision, threads)
        model = load_model(checkpoint, config, ops)
        if backend == "native":  # which reads the files in place for as long as it serves
            map_pages(checkpoint.mappings)
    _log.info("the model is loaded", backend=ops.backend, numerics_id=ops.numerics_id, after_s=_since(started))
    geometry = KvGeometry(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv_dtype=kv_dtype,
        model_fingerprint=fingerprint,
        kv_layout=kv_layout,
    )
    # Decoders of one id make the same tokens: same kernels, same rounding of K/V, same weights. The layout changes no bit.
    numerics_id = f"{ops.numerics_id}/kv-{kv_dtype}/{fingerprint[:8].hex()}"
    return LoadedModel(model, geometry, numerics_id), ops


def make_ops(backend: str, precision: str, threads: int | None) -> Ops:
    """A host backend by its name on the command line. Imported only now, so that one works where the other cannot load."""
    if backend == "native":
        native: Ops = importlib.import_module(NATIVE_MODULE).make_ops(threads, precision)
        return native
    from services.decoder.ops.mlx import MlxOps

    return MlxOps()


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)
