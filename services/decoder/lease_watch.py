"""Whether the decoder can serve: what a port of leases tells its engine, seen by the server too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.decoder.leases import (
    AcquireAsk,
    ExtendAsk,
    KvGeometry,
    LeaseMessage,
    LeasePort,
    ManagerAway,
    ManagerBack,
    PoolReady,
    Post,
    SealAsk,
)


class LeaseWatch:
    """A LeasePort that passes everything on, and remembers whether there are blocks to lease. Made on the event loop."""

    def __init__(self, inner: LeasePort) -> None:
        self._inner = inner
        self._loop = asyncio.get_running_loop()
        self.can_serve = False
        self.block_size = 0  # tokens; 0 until the pool is there
        self.changed = asyncio.Event()  # set whenever can_serve was decided anew; cleared by who waits

    def bind(self, geometry: KvGeometry, post: Post, busy_ms: Callable[[], int | None]) -> None:
        """See LeasePort."""

        def watched(message: LeaseMessage) -> None:
            post(message)
            # After the engine has it: who sees can_serve may submit at once.
            if isinstance(message, (PoolReady, ManagerAway, ManagerBack)):
                self._loop.call_soon_threadsafe(self._note, message)

        self._inner.bind(geometry, watched, busy_ms)

    def acquire(self, ask: AcquireAsk) -> None:
        """See LeasePort."""
        self._inner.acquire(ask)

    def extend(self, ask: ExtendAsk) -> None:
        """See LeasePort."""
        self._inner.extend(ask)

    def seal(self, ask: SealAsk) -> None:
        """See LeasePort."""
        self._inner.seal(ask)

    def release(self, cache_id: int) -> None:
        """See LeasePort."""
        self._inner.release(cache_id)

    def release_block(self, cache_id: int, block_id: int) -> None:
        """See LeasePort."""
        self._inner.release_block(cache_id, block_id)

    async def open(self) -> None:
        """See LeasePort."""
        await self._inner.open()

    async def close(self) -> None:
        """See LeasePort."""
        await self._inner.close()

    async def until_can_serve(self) -> None:
        """Waits until there are blocks to lease."""
        while not self.can_serve:
            await self.changed.wait()
            self.changed.clear()

    def _note(self, message: PoolReady | ManagerAway | ManagerBack) -> None:
        self.can_serve = not isinstance(message, ManagerAway)
        if isinstance(message, PoolReady):
            self.block_size = message.block_size
        self.changed.set()
