"""Sampling for the native backend: plain greedy rows in C, all others as every backend does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.decoder.sampler import RowSampling, Sampled, sample_rows


def sample(lib: ctypes.CDLL, context: int, logits: npt.NDArray[np.float32], rows: Sequence[RowSampling]) -> Sampled:
    """A token for each row of logits."""
    count, vocab_size = logits.shape
    ids = np.empty(count, np.int32)
    logprobs: list[float | None] = [None] * count
    top: list[Sequence[tuple[int, float]]] = [()] * count
    plain = np.array([_is_plain(row) for row in rows], np.bool_)
    if plain.any():
        wanted = np.empty(count, np.float32) if any(row.num_logprobs is not None for row in rows) else None
        address = None if wanted is None else wanted.ctypes.data
        lib.lh_greedy(context, logits.ctypes.data, count, vocab_size, ids.ctypes.data, address)
        if wanted is not None:
            logprobs = [None if row.num_logprobs is None else float(wanted[i]) for i, row in enumerate(rows)]
        plain &= ids >= 0  # a row that is not finite is left to the sampler, which names it
    others = np.flatnonzero(~plain).tolist()
    if others:
        drawn = sample_rows(logits[others], [rows[i] for i in others])
        for place, i in enumerate(others):
            ids[i], logprobs[i], top[i] = drawn.token_ids[place], drawn.logprobs[place], drawn.top[place]
    return Sampled(ids, logprobs, top)


def _is_plain(row: RowSampling) -> bool:
    """Greedy, with nothing that changes the logits and no alternatives to report."""
    params = row.params
    changed = (
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.logit_bias
        or row.banned_token_ids
    )
    return params.temperature == 0.0 and not changed and not row.num_logprobs
