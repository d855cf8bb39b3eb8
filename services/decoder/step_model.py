"""What the engine needs of a model, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from services.decoder.batch import Batch
from services.decoder.kv_view import KvView
from services.decoder.leases import KvGeometry
from services.decoder.sampler import Sampled


class StepModel(Protocol):
    """What the engine needs of a loaded model. Built, and called, on the engine's thread only."""

    def begin(self, batch: Batch, kv: KvView) -> Any:
        """Takes over a batch, whose arrays stay unchanged until `commit`; answers a step."""
        ...

    def forward(self, step: Any) -> Sampled:
        """Computes and samples; only reads the pool."""
        ...

    def commit(self, step: Any) -> None:
        """Writes the step's K/V rows into the pool."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what its K/V is."""

    model: StepModel
    kv_geometry: KvGeometry
    numerics_id: str  # of its backend
