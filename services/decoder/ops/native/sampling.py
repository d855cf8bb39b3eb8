"""Sampling for the native backend: what `sampler.sample_rows` does, with the same bits, in C on the thread team."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.decoder.errors import EngineFailedError
from services.decoder.ops.native.layout import SampleRow
from services.decoder.sampler import Float32Array, RowSampling, Sampled, adjusted, log_total, sample_rows, uniform


def sample(lib: ctypes.CDLL, context: int, logits: Float32Array, rows: Sequence[RowSampling]) -> Sampled:
    """A token for each row of logits [N, vocab_size], which stay unchanged."""
    count, vocab_size = logits.shape
    asked = (SampleRow * count)()
    first, row_bytes = logits.ctypes.data, logits.strides[0]
    kept: list[Float32Array] = []  # adjusted logits, alive until the call is over
    alternatives: dict[int, npt.NDArray[np.int32]] = {}
    for index, row in enumerate(rows):
        to = asked[index]
        params = row.params
        changed = adjusted(logits[index], row) if _may_change(row) else None
        if changed is not None:
            kept.append(changed)
        to.logits = first + index * row_bytes if changed is None else changed.ctypes.data
        if params.temperature:
            to.temperature, to.top_k, to.top_p, to.min_p = params.temperature, params.top_k, params.top_p, params.min_p
            to.noise = uniform(params.seed, row.sample_index, row.position)
        if row.num_logprobs is not None:
            to.raw = first + index * row_bytes
            if row.num_logprobs:
                ids = alternatives[index] = np.empty(min(row.num_logprobs, vocab_size), np.int32)
                to.alternatives, to.num_alternatives = ids.ctypes.data, len(ids)
    if lib.lh_sample(context, asked, count, vocab_size):
        raise EngineFailedError(f"no memory to sample {count} rows of {vocab_size} logits; lower --max-seqs")
    token_ids = np.empty(count, np.int32)
    logprobs: list[float | None] = [None] * count
    top: list[Sequence[tuple[int, float]]] = [()] * count
    for index, (row, drawn) in enumerate(zip(rows, asked, strict=True)):
        token_ids[index] = drawn.token_id
        if drawn.token_id < 0:  # not finite: the sampler names the logit, or draws where only bans are at fault
            alone = sample_rows(logits[index : index + 1], [row])
            token_ids[index], logprobs[index], top[index] = alone.token_ids[0], alone.logprobs[0], alone.top[0]
        elif row.num_logprobs is not None:
            raw, total = logits[index], log_total(drawn.raw_largest, drawn.raw_mass)
            logprobs[index] = float(raw[drawn.token_id]) - total
            if index in alternatives:
                top[index] = tuple((i, float(raw[i]) - total) for i in alternatives[index].tolist())
    return Sampled(token_ids, logprobs, top)


def _may_change(row: RowSampling) -> bool:
    """Whether the logits are not drawn from as they are."""
    params = row.params
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(penalised or params.logit_bias or row.banned_token_ids)
