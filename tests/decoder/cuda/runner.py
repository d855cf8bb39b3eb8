"""Drives a model step by step over a pool, without an engine: for tests and benchmarks of a backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from services.decoder.batch import Batch
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling, Sampled


@dataclass(eq=False)
class Stream:
    """One sequence: its tokens, how many are in the pool, and its blocks."""

    token_ids: list[int]
    blocks: list[int]
    num_computed: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        self.table = np.array(self.blocks, np.int32)

    def sampling(self) -> RowSampling:
        """Of its next token."""
        return RowSampling(self.params, 0, len(self.token_ids), None)


def batch_of(chunks: list[tuple[Stream, int]], block_size: int) -> Batch:
    """The step that computes `count` more tokens of each stream; rows that reach a stream's end are sampled."""
    tokens: list[int] = []
    starts, samples, sampling = [0], [], []
    tables = np.zeros((len(chunks), max(len(stream.blocks) for stream, _ in chunks)), np.int32)
    for index, (stream, count) in enumerate(chunks):
        first = stream.num_computed
        tokens += stream.token_ids[first : first + count]
        tables[index, : len(stream.blocks)] = stream.table
        starts.append(starts[-1] + count)
        if first + count == len(stream.token_ids):
            samples.append(starts[-1] - 1)
            sampling.append(stream.sampling())
    contexts, counts = np.array([stream.num_computed for stream, _ in chunks], np.int32), np.diff(starts)
    sequences = np.repeat(np.arange(len(chunks)), counts)
    positions = (np.arange(starts[-1]) - np.array(starts)[sequences] + contexts[sequences]).astype(np.int32)
    blocks = tables[sequences, positions // block_size].astype(np.int64)
    return Batch(
        token_ids=np.array(tokens, np.int32),
        positions=positions,
        cu_seqlens=np.array(starts, np.int32),
        context_lens=contexts,
        block_tables=tables,
        slot_mapping=blocks * block_size + positions % block_size,
        sample_rows=np.array(samples, np.int32),
        sampling=sampling,
    )


def run_step(model: Any, pool: Any, chunks: list[tuple[Stream, int]]) -> Sampled:
    """One whole step; sampled tokens are appended to their streams."""
    step = model.begin(batch_of(chunks, pool.shape.block_size), pool)
    sampled: Sampled = model.forward(step)
    model.commit(step)
    _advance(chunks, sampled)
    return sampled


def run_logits(model: Any, pool: Any, chunks: list[tuple[Stream, int]]) -> np.ndarray[Any, Any]:
    """One whole step that answers with logits instead."""
    step = model.begin(batch_of(chunks, pool.shape.block_size), pool)
    logits: np.ndarray[Any, Any] = model.logits(step)
    model.commit(step)
    for stream, count in chunks:
        stream.num_computed += count
    return logits


def _advance(chunks: list[tuple[Stream, int]], sampled: Sampled) -> None:
    ids = iter(sampled.token_ids.tolist())
    for stream, count in chunks:
        reaches_end = stream.num_computed + count == len(stream.token_ids)
        stream.num_computed += count
        if reaches_end:
            stream.token_ids.append(next(ids))
