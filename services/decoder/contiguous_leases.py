"""Leases without a manager, for --no-paged: a request owns one cache as long as the capacity (S18, S33)."""

from __future__ import annotations

from collections.abc import Callable

from services.decoder.kv_view import ContiguousKv
from services.decoder.leases import AcquireAsk, ExtendAsk, ForkAsk, KvGeometry, LeaseGranted, PoolReady, Post, SealAsk


class ContiguousLeases:
    """A LeasePort over caches of the decoder's own: each is one block of kv_capacity tokens, so every answer is at hand."""

    def __init__(self, make_kv: Callable[[KvGeometry], ContiguousKv]) -> None:
        """`make_kv` makes caches for as many requests as the engine seats; it is called on the engine's thread."""
        self._make_kv = make_kv
        self._held: dict[int, int] = {}  # cache id to the cache that it has
        self._bound: tuple[ContiguousKv, Post] | None = None

    def bind(self, geometry: KvGeometry, post: Post, busy_ms: Callable[[], int | None]) -> None:
        """See LeasePort."""
        kv = self._make_kv(geometry)
        self._bound = kv, post
        post(PoolReady(kv, kv.shape.block_size))

    def acquire(self, ask: AcquireAsk) -> None:
        """See LeasePort. The engine asks for at most max_seqs leases at a time, so that one is free."""
        kv, post = self._require_bound()
        if ask.num_blocks != 1:
            raise ValueError(f"{ask.num_blocks} blocks for one cache: the request is longer than the capacity")
        self._held[ask.cache_id] = block_id = kv.take()
        post(LeaseGranted(ask.cache_id, (block_id,), 0, None))

    def fork(self, ask: ForkAsk) -> None:
        """See LeasePort. Never asked for: PoolReady did not say can_seal."""
        raise ValueError(f"cache {ask.cache_id} can share no blocks: it is its request's own")

    def extend(self, ask: ExtendAsk) -> None:
        """See LeasePort. Never asked for: one block holds the whole capacity."""
        raise ValueError(f"cache {ask.cache_id} cannot grow to {ask.num_blocks} blocks: it is one block already")

    def seal(self, ask: SealAsk) -> None:
        """See LeasePort. Never asked for: PoolReady did not say can_seal."""
        raise ValueError(f"cache {ask.cache_id} cannot be sealed: it is its request's own")

    def release_block(self, cache_id: int, block_id: int) -> None:
        """See LeasePort. Never asked for."""
        raise ValueError(f"cache {cache_id} has no single block {block_id} to give back")

    def release(self, cache_id: int) -> None:
        """See LeasePort."""
        block_id = self._held.pop(cache_id, None)
        if block_id is not None:
            self._require_bound()[0].give_back(block_id)

    async def open(self) -> None:
        """See LeasePort."""

    async def close(self) -> None:
        """See LeasePort."""

    def _require_bound(self) -> tuple[ContiguousKv, Post]:
        if self._bound is None:
            raise RuntimeError("the engine must be started before it leases anything")
        return self._bound
