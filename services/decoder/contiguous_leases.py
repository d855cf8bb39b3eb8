"""Leases without a manager, for --no-paged: a request owns one cache as long as the capacity (S18, S33)."""

from __future__ import annotations

from collections.abc import Callable

from services.decoder.kv_view import KvView
from services.decoder.leases import AcquireAsk, ExtendAsk, KvGeometry, LeaseGranted, PoolReady, Post, SealAsk


class ContiguousLeases:
    """A LeasePort over caches of the decoder's own: each is one block of kv_capacity tokens, so every answer is at hand."""

    def __init__(self, make_kv: Callable[[KvGeometry], KvView], max_seqs: int, kv_capacity: int) -> None:
        """`make_kv` makes max_seqs blocks of kv_capacity tokens; it is called on the engine's thread."""
        self._make_kv = make_kv
        self._kv_capacity = kv_capacity
        # Reversed, so that low numbers go first; a freed cache is the next to be used again (S16).
        self._free = list(reversed(range(max_seqs)))
        self._held: dict[int, int] = {}
        self._post: Post | None = None

    def bind(self, geometry: KvGeometry, post: Post, busy_ms: Callable[[], int | None]) -> None:
        """See LeasePort."""
        self._post = post
        post(PoolReady(self._make_kv(geometry), self._kv_capacity))

    def acquire(self, ask: AcquireAsk) -> None:
        """See LeasePort. The engine asks for at most max_seqs leases at a time, so that one is free."""
        if self._post is None:
            raise RuntimeError("acquire before bind")
        if ask.num_blocks != 1:
            raise ValueError(f"{ask.num_blocks} blocks for one cache: the request is longer than the capacity")
        block_id = self._free.pop()
        self._held[ask.cache_id] = block_id
        self._post(LeaseGranted(ask.cache_id, (block_id,), 0, None))

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
            self._free.append(block_id)

    async def open(self) -> None:
        """See LeasePort."""

    async def close(self) -> None:
        """See LeasePort."""
