"""Drawing tokens from logits. Noise is a pure function of (seed, sample index, position), so a stream can be resumed exactly."""

from __future__ import annotations

import hashlib
import math
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

# The native backend's sample.c has the same constants.
BLOCK_WEIGHTS = 1024
_LANES = 8
_CHUNK = 8192
_FEW_BLOCKS = 8
_LEAST_EXPONENT = -700.0
_LOG2_E = 1.4426950408889634
_LN_2_HIGH, _LN_2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SERIES = tuple(1.0 / math.factorial(power) for power in range(13, -1, -1))


@dataclass(slots=True)  # not frozen, which takes four times as long to make: there is one for every token
class RowSampling:
    """How one row's token is drawn. Nobody changes it."""

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
        token_id = _draw(adjusted(raw, row), row)
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


def weights_of(logits: Float32Array, temperature: float) -> _Float64Array:
    """e^((logits - largest) / temperature); what is below e^-700 is zero.

    Made of operations whose rounding IEEE 754 fixes, so that every machine, NumPy and C have the same bits: np.exp's differ
    with the instruction set.
    """
    highest = float(logits.max())
    weights = np.empty(len(logits))
    for start in range(0, len(logits), _CHUNK):  # the passes over a chunk stay in the cache
        part = slice(start, start + _CHUNK)
        weights[part] = _exponentials((logits[part].astype(np.float64) - highest) / temperature)
    return weights


def _exponentials(exponent: _Float64Array) -> _Float64Array:
    clamped = np.maximum(exponent, _LEAST_EXPONENT)
    powers = np.rint(clamped * _LOG2_E)
    rest = clamped - powers * _LN_2_HIGH
    rest -= powers * _LN_2_LOW
    series = np.full(len(exponent), _SERIES[0])
    for coefficient in _SERIES[1:]:
        series *= rest
        series += coefficient
    weights = (series.view(np.int64) + (powers.astype(np.int64) << 52)).view(np.float64)  # times 2 ** powers
    weights[exponent < _LEAST_EXPONENT] = 0.0
    return weights


def masses_of(weights: _Float64Array) -> _Float64Array:
    """The sum of all weights up to the end of each block [ceil(K / BLOCK_WEIGHTS)].

    A block is summed in eight lanes that are then folded in halves, an order that vectors of any width can keep.
    """
    padded = np.zeros(-(-len(weights) // BLOCK_WEIGHTS) * BLOCK_WEIGHTS)
    padded[: len(weights)] = weights
    rows = padded.reshape(-1, BLOCK_WEIGHTS // _LANES, _LANES)
    if len(rows) < _FEW_BLOCKS:
        lanes = np.add.accumulate(rows, axis=1)[:, -1]
    else:  # the same sums, without storing those on the way
        lanes = np.zeros((len(rows), _LANES))
        for index in range(BLOCK_WEIGHTS // _LANES):
            lanes += rows[:, index]
    halves = lanes[:, :4] + lanes[:, 4:]
    quarters = halves[:, :2] + halves[:, 2:]
    return np.cumsum(quarters[:, 0] + quarters[:, 1])


def keep(logits: Float32Array, params: SamplingParams) -> tuple[_IdArray, _Float64Array]:
    """The tokens [K] that the filters leave, in the order of their ids, and their weights (not normalised)."""
    ids = _top_k(logits, params.top_k)
    weights = weights_of(logits[ids], params.temperature)
    if params.top_p < 1.0:
        chosen = _nucleus(weights, params.top_p)
        ids, weights = ids[chosen], weights[chosen]
    if params.min_p > 0.0:
        chosen = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = ids[chosen], weights[chosen]
    return ids, weights


def _nucleus(weights: _Float64Array, top_p: float) -> _IdArray:
    """The places, ascending, of the weights that reach top_p of their sum, the largest first."""
    # Whole numbers have one sum in any order, so that nobody has to sort all weights to agree on where the nucleus ends.
    shares = np.rint(weights * 2.0 ** (62 - len(weights).bit_length())).astype(np.int64)
    order = np.argsort(-weights, kind="stable")
    before = np.concatenate(([0], np.cumsum(shares[order])[:-1]))
    limit = math.ceil(top_p * float(shares.sum())) if top_p > 0.0 else 1
    return np.sort(order[before < limit])


def adjusted(raw: Float32Array, row: RowSampling) -> Float32Array:
    """The logits that are drawn from: raw itself where nothing changes them, else a copy."""
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
    noise = uniform(row.params.seed, row.sample_index, row.position)
    return int(ids[_place(weights, noise)])


def _place(weights: _Float64Array, noise: float) -> int:
    """Where the running sum of the weights exceeds noise times their sum: first the block, then the place in it."""
    masses = masses_of(weights)
    target = noise * masses[-1]
    block = _first_above(masses, target)
    start = block * BLOCK_WEIGHTS
    before = masses[block - 1] if block else 0.0
    return start + _first_above(np.cumsum(weights[start : start + BLOCK_WEIGHTS]), target - before)


def _first_above(sums: _Float64Array, target: float) -> int:
    # side="right" skips weights of 0; rounding may have put the target at the whole sum, or above.
    return min(int(np.searchsorted(sums, target, side="right")), int(np.searchsorted(sums, sums[-1])))


def _top_k(logits: Float32Array, top_k: int) -> _IdArray:
    """The ids of the top_k largest logits, ascending, of equals the lowest; all of them for 0."""
    if top_k == 0 or top_k >= len(logits):
        return np.arange(len(logits))
    threshold = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
    above = np.flatnonzero(logits > threshold)
    equal = np.flatnonzero(logits == threshold)[: top_k - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _report(raw: Float32Array, token_id: int, num_logprobs: int) -> tuple[float, Sequence[tuple[int, float]]]:
    total = log_total(float(raw.max()), float(masses_of(weights_of(raw, 1.0))[-1]))
    if num_logprobs == 0:
        return float(raw[token_id]) - total, ()
    ids = _top_k(raw, num_logprobs)
    ids = ids[np.argsort(-raw[ids], kind="stable")]
    return float(raw[token_id]) - total, tuple((int(i), float(raw[i]) - total) for i in ids)


def log_total(highest: float, mass: float) -> float:
    """The log-sum-exp of logits, from the largest and the sum of all weights."""
    return highest + math.log(mass)
