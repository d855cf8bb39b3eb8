"""Where the K/V bytes are, for a backend: the mapped pool, or caches of the decoder's own."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protos.pool_format import BlockShape


class KvView(Protocol):
    """Blocks of K/V, `[num_layers, 2, num_kv_heads, block_size, head_dim]` each (K first), readable and writable in place.

    A contiguous cache is one block that is as long as the capacity, so a backend needs to know of blocks only.
    """

    kv_dtype: str  # "bf16", "f16" or "f32"
    shape: BlockShape

    def block(self, block_id: int) -> npt.NDArray[Any]:
        """A writable view of one block, without a copy; bf16 comes as uint16."""
        ...

    def gather(self, block_ids: npt.NDArray[np.int32], layer: int) -> npt.NDArray[Any]:
        """A copy [num_ids, 2, num_kv_heads, block_size, head_dim] of one layer of some blocks."""
        ...

    def addresses(self, block_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """The memory address of each block, same shape as block_ids, for native kernels."""
        ...
