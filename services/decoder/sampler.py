"""Drawing tokens from logits. Noise is a pure function of (seed, sample index, position), so a stream can be resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.decoder.request import SamplingParams


@dataclass(frozen=True)
class RowSampling:
    """How one row's token is drawn."""

    params: SamplingParams
    sample_index: int
    position: int  # of the token to draw, among the generated ones
    num_logprobs: int | None  # alternatives to report; None: no logprobs at all
    output_counts: Mapping[int, int] | None = None  # generated so far, token id to count; None: no penalty wants it
    seen_token_ids: frozenset[int] | None = None  # prompt and output, for the repetition penalty
    banned_token_ids: frozenset[int] = frozenset()  # stop tokens before min_tokens


@dataclass(frozen=True)
class Sampled:
    """N sampled tokens."""

    token_ids: npt.NDArray[np.int32]  # [N]
    logprobs: Sequence[float | None]  # [N], of the sampled token, before temperature and filters
    top: Sequence[Sequence[tuple[int, float]]]  # [N], (token id, logprob) in falling order
