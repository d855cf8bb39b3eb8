"""One step's input: the arrays that the engine fills and a backend reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.decoder.sampler import RowSampling

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """A mixed batch: some sequences decode one token, others prefill a chunk. T tokens of S sequences.

    Row r of sequence s has `positions[r]` in s and attends to the `context_lens[s]` tokens that are in the pool and to the step's
    own rows of s up to itself. The arrays are views of buffers that the engine reuses from step to step.
    """

    token_ids: IntArray  # [T]
    positions: IntArray  # [T]
    cu_seqlens: IntArray  # [S + 1]; sequence s owns rows cu_seqlens[s] to cu_seqlens[s + 1]
    context_lens: IntArray  # [S], tokens whose K/V is in the pool before this step
    # [S, width]; entry i holds tokens [i * block_size, (i + 1) * block_size). Only the entries that hold context or new rows mean
    # anything: 0 is a real block, and the padding is never read.
    block_tables: IntArray
    slot_mapping: npt.NDArray[np.int64]  # [T], block_id * block_size + offset: where row r is committed
    sample_rows: IntArray  # [N], the rows whose next token is sampled, ascending
    sampling: Sequence[RowSampling]  # [N], how

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.context_lens)
