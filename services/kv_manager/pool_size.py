"""How many blocks a pool has, and whether the flags fit a pool that is there already."""

from __future__ import annotations

from services.kv_manager.config import MAX_NUM_BLOCKS, Config
from services.kv_manager.errors import PoolFileError, PoolSizeError
from services.kv_manager.meta_format import WorkerRecord
from services.kv_manager.pool_file import PoolFiles


def num_blocks_for(config: Config, worker: WorkerRecord, stride_bytes: int) -> int:
    """Blocks of a new pool: what the flags say, or else what its first worker may need; raises PoolSizeError for none or too many."""
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.pool_bytes is not None:
        num_blocks = config.pool_bytes // stride_bytes
    else:
        num_blocks = worker.max_seqs * -(-worker.kv_capacity_tokens // config.block_size)
    if not 1 <= num_blocks <= MAX_NUM_BLOCKS:
        raise PoolSizeError(
            f"the pool would have {num_blocks} blocks of {stride_bytes} bytes, not 1 to {MAX_NUM_BLOCKS}: change the"
            f" manager's --num-blocks or --pool-bytes (now {config.num_blocks or config.pool_bytes or 'not given'})"
        )
    return num_blocks


def require_flags_fit(config: Config, files: PoolFiles) -> None:
    """Raises PoolFileError when a flag contradicts the pool."""
    path = files.meta.path
    hint = "use another --pool-dir, or stop the decoders and delete the pool's .meta and .kv"
    if files.block_size != config.block_size:
        raise PoolFileError(
            f"--block-size: {config.block_size}, but {path} has blocks of {files.block_size} tokens; {hint}"
        )
    stride = files.data.header.shape.stride_bytes
    if config.num_blocks is not None and config.num_blocks != files.num_blocks:
        raise PoolFileError(f"--num-blocks: {config.num_blocks}, but {path} has {files.num_blocks} blocks; {hint}")
    if config.pool_bytes is not None and config.pool_bytes // stride != files.num_blocks:
        raise PoolFileError(
            f"--pool-bytes: {config.pool_bytes} bytes are {config.pool_bytes // stride} blocks, but {path} has"
            f" {files.num_blocks}; {hint}"
        )
