"""The arrays of a step, kept from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch, IntArray
from services.decoder.sampler import RowSampling
from services.decoder.sequence import Chunk

_FIRST_CAPACITY_TOKENS = 64


class StepBuffers:
    """Buffers for up to max_num_batched_tokens tokens, which grow only when a step needs more than they hold (S1).

    The block-table and context-length buffers have the dimensions that were pinned with the pool's geometry, and growth leaves them alone.
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        self._max_tokens = max_num_batched_tokens
        self._pinned: tuple[int, int] | None = None
        self._block_tables: IntArray = np.zeros((0, 0), np.int32)
        self._context_lens: IntArray = np.zeros(0, np.int32)
        self._cu_seqlens: IntArray = np.zeros(1, np.int32)
        self._sample_rows: IntArray = np.zeros(0, np.int32)
        self._allocate_tokens(0)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit without growth."""
        return len(self._token_ids)

    @property
    def pinned(self) -> tuple[int, int] | None:
        """(max_seqs, max_blocks_per_seq), or None before `pin`."""
        return self._pinned

    def pin(self, max_seqs: int, max_blocks_per_seq: int) -> None:
        """Fixes the dimensions of the batch, and allocates what depends on them (S4)."""
        if self._pinned == (max_seqs, max_blocks_per_seq):
            return
        self._block_tables = np.zeros((max_seqs, max_blocks_per_seq), np.int32)
        self._context_lens = np.zeros(max_seqs, np.int32)
        self._cu_seqlens = np.zeros(max_seqs + 1, np.int32)
        self._sample_rows = np.zeros(max_seqs, np.int32)
        self._pinned = (max_seqs, max_blocks_per_seq)

    def fill(self, chunks: Sequence[Chunk], block_size: int) -> Batch:
        """The batch of these chunks, in views that the next `fill` overwrites. Raises ValueError beyond the limits."""
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        width = max((len(chunk.sequence.block_ids) for chunk in chunks), default=0)
        self._check(chunks, num_tokens, width)
        if num_tokens > self.capacity_tokens:
            self._allocate_tokens(min(max(num_tokens, 2 * self.capacity_tokens), self._max_tokens))
        sampling: list[RowSampling] = []
        row = 0
        for index, chunk in enumerate(chunks):
            self._fill_chunk(index, row, chunk, width, block_size)
            row += chunk.num_tokens
            self._cu_seqlens[index + 1] = row
            if chunk.reaches_end:
                self._sample_rows[len(sampling)] = row - 1
                sampling.append(chunk.sequence.next_sampling())
        num_seqs = len(chunks)
        return Batch(
            token_ids=self._token_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            cu_seqlens=self._cu_seqlens[: num_seqs + 1],
            context_lens=self._context_lens[:num_seqs],
            block_tables=self._block_tables[:num_seqs, :width],
            slot_mapping=self._slot_mapping[:num_tokens],
            sample_rows=self._sample_rows[: len(sampling)],
            sampling=sampling,
        )

    def _allocate_tokens(self, capacity: int) -> None:
        capacity = max(capacity, min(_FIRST_CAPACITY_TOKENS, self._max_tokens))
        self._token_ids: IntArray = np.zeros(capacity, np.int32)
        self._positions: IntArray = np.zeros(capacity, np.int32)
        self._slot_mapping: npt.NDArray[np.int64] = np.zeros(capacity, np.int64)

    def _check(self, chunks: Sequence[Chunk], num_tokens: int, width: int) -> None:
        if self._pinned is None:
            raise ValueError("the batch dimensions are not pinned: there is no pool yet")
        max_seqs, max_blocks = self._pinned
        if len(chunks) > max_seqs or width > max_blocks or num_tokens > self._max_tokens:
            raise ValueError(
                f"a step of {len(chunks)} sequences, {num_tokens} tokens and tables of {width} blocks exceeds "
                f"{max_seqs} sequences, {self._max_tokens} tokens or {max_blocks} blocks"
            )

    def _fill_chunk(self, index: int, row: int, chunk: Chunk, width: int, block_size: int) -> None:
        sequence = chunk.sequence
        start, count = sequence.num_computed, chunk.num_tokens
        blocks = sequence.block_ids
        if start + count > len(blocks) * block_size:
            raise ValueError(f"{start + count} tokens do not fit into {len(blocks)} blocks of {block_size}")
        # The whole used width, so that no entry of a longer table that was in this row before is left (S34).
        self._block_tables[index, : len(blocks)] = blocks
        self._block_tables[index, len(blocks) : width] = 0
        self._context_lens[index] = start
        if count == 1:
            self._token_ids[row] = sequence.token_ids[start]
            self._positions[row] = start
            self._slot_mapping[row] = int(blocks[start // block_size]) * block_size + start % block_size
            return
        rows = slice(row, row + count)
        positions = np.arange(start, start + count, dtype=np.int64)
        self._token_ids[rows] = sequence.token_ids[start : start + count]
        self._positions[rows] = positions
        self._slot_mapping[rows] = (
            blocks[positions // block_size].astype(np.int64) * block_size + positions % block_size
        )
