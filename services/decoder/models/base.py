"""What the engine knows of a model: four calls a step."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.kv_view import KvView
from services.decoder.model_config import ModelConfig
from services.decoder.ops.base import Handle
from services.decoder.sampler import Sampled


class Model(Protocol):
    """A loaded model with its backend. All calls come from the thread that loaded it.

    A step is `begin`, `forward`, `commit`. One that is abandoned before `commit` leaves no trace in the pool.
    """

    @property
    def config(self) -> ModelConfig:
        """The configuration it was loaded with."""
        ...

    def begin(self, batch: Batch, kv: KvView) -> Handle:
        """Takes over a batch, whose arrays stay unchanged until `commit`; returns the step for the other calls."""
        ...

    def forward(self, step: Handle) -> Sampled:
        """Runs all layers and samples a token for each of the batch's `sample_rows` (none is fine)."""
        ...

    def logits(self, step: Handle) -> npt.NDArray[np.float32]:
        """In place of `forward`: logits [num_sample_rows, vocab_size], for tests and tools."""
        ...

    def commit(self, step: Handle) -> None:
        """Writes the step's K/V rows into the slots of its batch, after `forward` or `logits`. Ends the step."""
        ...
