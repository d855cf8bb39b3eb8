"""The model families that can be served, by the `model_type` of their config.json."""

from __future__ import annotations

from collections.abc import Callable

from services.decoder.errors import CheckpointError
from services.decoder.loader import Checkpoint
from services.decoder.model_config import ModelConfig
from services.decoder.models import qwen3_moe
from services.decoder.models.base import Model
from services.decoder.ops.base import Ops

__all__ = ["Model", "load_model"]

_LOADERS: dict[str, Callable[[Checkpoint, ModelConfig, Ops], Model]] = {"qwen3_moe": qwen3_moe.load}


def load_model(checkpoint: Checkpoint, config: ModelConfig, ops: Ops) -> Model:
    """Loads the weights into the backend; call it on the thread that will step the model."""
    loader = _LOADERS.get(config.model_type)
    if loader is None:
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'}: model_type {config.model_type!r} is not served; "
            f"served are {', '.join(sorted(_LOADERS))}"
        )
    return loader(checkpoint, config, ops)
