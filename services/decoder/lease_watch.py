"""Whether the decoder can serve: what a port of leases tells its engine, seen by the server too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.decoder.leases import (
    AcquireAsk,
    ExtendAsk,
    ForkAsk,
    KvGeometry,
    LeaseGranted,
    LeaseMessage,
    LeasePort,
    LeaseRefused,
    ManagerAway,
    ManagerBack,
    PoolReady,
    Post,
    SealAsk,
)
from services.metrics import Histogram


class LeaseMeter:
    """How long asks for blocks take. Asks come from the engine's thread, answers from one other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[int, tuple[str, float]] = {}  # by cache id, which has one open ask at a time
        self.waits = {"acquire": Histogram(), "fork": Histogram(), "extend": Histogram()}
        self.num_refused = 0

    def ask(self, kind: str, cache_id: int) -> None:
        """An Acquire, Fork or Extend goes out."""
        self._asked[cache_id] = (kind, self._clock())

    def answer(self, cache_id: int, is_granted: bool) -> None:
        """Its answer has come."""
        asked = self._asked.pop(cache_id, None)
        if asked is not None:
            self.waits[asked[0]].observe(self._clock() - asked[1])
            self.num_refused += not is_granted

    def withdraw(self, cache_id: int) -> None:
        """The lease is given back; an ask that is open gets no answer."""
        self._asked.pop(cache_id, None)


class LeaseWatch:
    """A LeasePort that passes everything on, and remembers whether there are blocks to lease. Made on the event loop."""

    def __init__(self, inner: LeasePort) -> None:
        self.meter = LeaseMeter()
        self._inner = inner
        self._loop = asyncio.get_running_loop()
        self.can_serve = False
        self.block_size = 0  # tokens; 0 until the pool is there
        self.changed = asyncio.Event()  # set whenever can_serve was decided anew; cleared by who waits

    def bind(self, geometry: KvGeometry, post: Post, busy_ms: Callable[[], int | None]) -> None:
        """See LeasePort."""

        def watched(message: LeaseMessage) -> None:
            post(message)
            if isinstance(message, (LeaseGranted, LeaseRefused)):
                self.meter.answer(message.cache_id, isinstance(message, LeaseGranted))
            # After the engine has it: who sees can_serve may submit at once.
            if isinstance(message, (PoolReady, ManagerAway, ManagerBack)):
                self._loop.call_soon_threadsafe(self._note, message)

        self._inner.bind(geometry, watched, busy_ms)

    def acquire(self, ask: AcquireAsk) -> None:
        """See LeasePort."""
        self.meter.ask("acquire", ask.cache_id)
        self._inner.acquire(ask)

    def fork(self, ask: ForkAsk) -> None:
        """See LeasePort."""
        self.meter.ask("fork", ask.cache_id)
        self._inner.fork(ask)

    def extend(self, ask: ExtendAsk) -> None:
        """See LeasePort."""
        self.meter.ask("extend", ask.cache_id)
        self._inner.extend(ask)

    def seal(self, ask: SealAsk) -> None:
        """See LeasePort."""
        self._inner.seal(ask)

    def release(self, cache_id: int) -> None:
        """See LeasePort."""
        self.meter.withdraw(cache_id)
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
