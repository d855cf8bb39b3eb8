"""Drawing tokens from logits. Noise is a pure function of (seed, sample index, position), so a stream can be resumed exactly."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.decoder.errors import EngineFailedError
from services.decoder.request import SamplingParams

Float32Array = npt.NDArray[np.float32]
_Float64Array = npt.NDArray[np.float64]
_IdArray = npt.NDArray[np.int64]


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


def sample_rows(logits: Float32Array, rows: Sequence[RowSampling]) -> Sampled:
    """Draws one token for each row of logits [N, vocab_size], which stay unchanged.

    Penalties, logit_bias and bans first, in the order of OpenAI's and transformers' processors; then temperature, top-k,
    top-p among the rest, and min-p. Ties go to the lowest id. A row's result depends on that row alone.
    """
    if len(logits) != len(rows):
        raise ValueError(f"{len(logits)} rows of logits for {len(rows)} rows to sample")
    token_ids = np.empty(len(rows), np.int32)
    logprobs: list[float | None] = []
    top: list[Sequence[tuple[int, float]]] = []
    for index, row in enumerate(rows):
        raw = logits[index]
        token_id = _draw(_adjusted(raw, row), row)
        token_ids[index] = token_id
        logprob, alternatives = (None, ()) if row.num_logprobs is None else _report(raw, token_id, row.num_logprobs)
        logprobs.append(logprob)
        top.append(alternatives)
    return Sampled(token_ids, logprobs, top)


def uniform(seed: int, sample_index: int, position: int) -> float:
    """The noise of one draw: 53 bits of BLAKE2b as a number in [0, 1)."""
    counter = struct.pack("<QQQ", seed, sample_index, position)
    digest = hashlib.blake2b(counter, digest_size=8, person=b"leasehold-draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def keep(logits: Float32Array | _Float64Array, params: SamplingParams) -> tuple[_IdArray, _Float64Array]:
    """The tokens [K] that the filters leave, in the order of their ids, and their weights (not normalised)."""
    ids = _top_k(logits, params.top_k)
    scaled = logits[ids].astype(np.float64)
    weights = np.exp((scaled - scaled.max()) / params.temperature)
    if params.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order])
        before = np.concatenate(([0.0], mass[:-1]))
        chosen = np.sort(order[before < params.top_p * mass[-1]]) if params.top_p > 0.0 else order[:1]
        ids, weights = ids[chosen], weights[chosen]
    if params.min_p > 0.0:
        chosen = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = ids[chosen], weights[chosen]
    return ids, weights


def _adjusted(raw: Float32Array, row: RowSampling) -> Float32Array:
    params = row.params
    counts = row.output_counts if params.presence_penalty or params.frequency_penalty else None
    seen = row.seen_token_ids if params.repetition_penalty != 1.0 else None
    if not (counts or seen or params.logit_bias or row.banned_token_ids):
        return raw
    logits = raw.copy()
    if seen:
        ids = np.fromiter(seen, np.int64, len(seen))
        values = logits[ids]
        penalty = np.float32(params.repetition_penalty)
        logits[ids] = np.where(values > 0, values / penalty, values * penalty)
    if counts:
        ids = np.fromiter(counts.keys(), np.int64, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        logits[ids] -= times * np.float32(params.frequency_penalty)
        logits[ids] -= (times > 0) * np.float32(params.presence_penalty)
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += np.float32(bias)
    if row.banned_token_ids:
        logits[np.fromiter(row.banned_token_ids, np.int64, len(row.banned_token_ids))] = -np.inf
    return logits


def _draw(logits: Float32Array, row: RowSampling) -> int:
    best = int(np.argmax(logits))  # the lowest id of equals; a NaN, where there is one
    if not np.isfinite(logits[best]):
        raise EngineFailedError(f"the model's logits are not finite: token {best} has {logits[best]}")
    if row.params.temperature == 0.0:
        return best
    ids, weights = keep(logits, row.params)
    mass = np.cumsum(weights)
    target = uniform(row.params.seed, row.sample_index, row.position) * mass[-1]
    # side="right" skips tokens of weight 0; the product may round up to the whole mass.
    index = min(int(np.searchsorted(mass, target, side="right")), int(np.searchsorted(mass, mass[-1])))
    return int(ids[index])


def _top_k(logits: Float32Array | _Float64Array, top_k: int) -> _IdArray:
    """The ids of the top_k largest logits, ascending, of equals the lowest; all of them for 0."""
    if top_k == 0 or top_k >= len(logits):
        return np.arange(len(logits))
    threshold = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
    above = np.flatnonzero(logits > threshold)
    equal = np.flatnonzero(logits == threshold)[: top_k - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _report(raw: Float32Array, token_id: int, num_logprobs: int) -> tuple[float, Sequence[tuple[int, float]]]:
    logits = raw.astype(np.float64)
    highest = logits.max()
    total = highest + np.log(np.exp(logits - highest).sum())
    if num_logprobs == 0:
        return float(logits[token_id] - total), ()
    ids = _top_k(logits, num_logprobs)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return float(logits[token_id] - total), tuple((int(i), float(logits[i] - total)) for i in ids)
