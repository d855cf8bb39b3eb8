"""Checks sealed blocks against their checksums: before their first hit after a restart, and all of them on demand.

Bytes are read on a thread, so that keepalives are answered meanwhile, and a block that is being read is pinned.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

import structlog

from services.kv_manager.block_pool import BlockPool
from services.kv_manager.errors import PoolFileError
from services.kv_manager.lessor import Lessor

_log = structlog.get_logger("kv_manager.scrub")
_BLOCKS_A_READ = 16
_FLUSH_BLOCKS = 4096


@dataclass
class Progress:
    """How far a scrub has come; num_blocks is how many were sealed when it began."""

    num_blocks: int
    num_checked: int = 0
    num_corrupt: int = 0
    num_bytes: int = 0
    done: bool = False


class Verifier:
    """Reads blocks and compares; what does not match is discarded."""

    def __init__(self, lessor: Lessor) -> None:
        self._lessor = lessor

    async def verify_for_hits(self, hashes: Iterable[Iterable[bytes]]) -> None:
        """Verifies what these chains could hit and what nobody has verified since the start; usually there is nothing."""
        pool = self._lessor.pool
        if pool is None or not pool.num_unverified:
            return
        blocks = dict.fromkeys(block for chain in hashes for block in self._lessor.book.unverified(chain))
        if blocks:
            await self._verify(pool, list(blocks))

    async def _verify(self, pool: BlockPool, blocks: list[int]) -> tuple[int, int]:
        """Numbers of blocks checked and found corrupt; those that are not sealed any more are left out."""
        contents = {block: content for block in blocks if (content := pool.content(block)) is not None}
        for block in contents:
            pool.pin(block)
        try:
            sums = await asyncio.to_thread(lambda: {block: pool.files.data.checksum(block) for block in contents})
        finally:
            for block in contents:
                pool.unpin(block)
        num_checked = num_corrupt = 0
        for block, content in contents.items():
            if pool.content(block) is not content:
                continue  # flushed meanwhile
            num_checked += 1
            if sums[block] == content.data_checksum:
                pool.mark_verified(block)
                continue
            num_corrupt += 1
            self._lessor.discard_corrupt(block)
            _log.error("corrupt block", block=block, content_hash=content.content_hash.hex())
        return num_checked, num_corrupt

    async def scrub(self, max_bytes_per_s: int) -> AsyncGenerator[Progress, None]:
        """Checks every sealed block at most so fast (0: as fast as it goes); yields its progress, the last one done."""
        pool = self._lessor.pool
        blocks = pool.sealed_blocks() if pool is not None else []
        progress = Progress(len(blocks))
        loop = asyncio.get_running_loop()
        started = loop.time()
        for first in range(0, len(blocks), _BLOCKS_A_READ):
            assert pool is not None
            num_checked, num_corrupt = await self._verify(pool, blocks[first : first + _BLOCKS_A_READ])
            progress.num_checked += num_checked
            progress.num_corrupt += num_corrupt
            progress.num_bytes += num_checked * pool.files.data.header.shape.block_bytes
            yield progress
            if max_bytes_per_s:
                await asyncio.sleep(started + progress.num_bytes / max_bytes_per_s - loop.time())
        progress.done = True
        yield progress

    async def scrub_forever(self, bytes_per_s: int, interval_s: float = 60.0) -> None:
        """Scrubs in the background, round after round."""
        while True:
            try:
                async for progress in self.scrub(bytes_per_s):
                    if progress.done and progress.num_corrupt:
                        _log.error("scrub found corrupt blocks", num_corrupt=progress.num_corrupt)
            except (PoolFileError, OSError) as error:  # such as GPU memory that is not back yet
                _log.warning("scrub could not read the pool", error=str(error))
            await asyncio.sleep(interval_s)

    async def flush(self, tenant_digest: bytes | None) -> int:
        """Drops cached blocks, all or a tenant's, in slices that leave the loop free; answers how many."""
        pool = self._lessor.pool
        blocks = pool.cached_blocks() if pool is not None else []
        num_flushed = 0
        for first in range(0, len(blocks), _FLUSH_BLOCKS):
            assert pool is not None
            for block in blocks[first : first + _FLUSH_BLOCKS]:
                content = pool.content(block) if pool.is_cached(block) else None
                if content is not None and tenant_digest in (None, content.tenant_digest):
                    pool.discard(block)
                    num_flushed += 1
            await asyncio.sleep(0)
        return num_flushed
