"""What the engine has asked of the manager and the manager has not answered yet, across sessions."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from services.decoder.leases import AcquireAsk

# Items in one call. A reply of as many full tables stays far below the message limit.
MAX_ITEMS = 256


@dataclass(frozen=True)
class _Extend:
    cache_id: int
    num_blocks: int


@dataclass(frozen=True)
class _Release:
    cache_id: int


class Outbox:
    """Asks, kept until they are answered: a new session sends again what the old one left open.

    The engine's thread only appends to `_arrived`; everything else belongs to the event loop. A Release withdraws the asks for its lease,
    and is sent even when the Acquire was not answered, because it may have been served.
    """

    def __init__(self) -> None:
        self._arrived: deque[AcquireAsk | _Extend | _Release] = deque()
        self.acquires: dict[int, AcquireAsk] = {}
        self.extends: dict[int, int] = {}
        self._releases: dict[int, None] = {}  # a set in the order of arrival
        self.all_released = asyncio.Event()
        self.all_released.set()

    def acquire(self, ask: AcquireAsk) -> None:
        """Any thread."""
        self._arrived.append(ask)

    def extend(self, cache_id: int, num_blocks: int) -> None:
        """Any thread."""
        self._arrived.append(_Extend(cache_id, num_blocks))

    def release(self, cache_id: int) -> None:
        """Any thread."""
        self._arrived.append(_Release(cache_id))

    def sort(self) -> None:
        """Takes in what has arrived."""
        while self._arrived:
            ask = self._arrived.popleft()
            if isinstance(ask, AcquireAsk):
                self.acquires[ask.cache_id] = ask
            elif isinstance(ask, _Extend):
                self.extends[ask.cache_id] = ask.num_blocks
            else:
                self.acquires.pop(ask.cache_id, None)
                self.extends.pop(ask.cache_id, None)
                self._releases[ask.cache_id] = None
        self._note()

    def next_acquires(self) -> list[AcquireAsk]:
        """The oldest open ones, as many as fit into a call."""
        return list(islice(self.acquires.values(), MAX_ITEMS))

    def next_extends(self) -> list[tuple[int, int]]:
        """The oldest open ones, (cache id, number of blocks), as many as fit into a call."""
        return list(islice(self.extends.items(), MAX_ITEMS))

    def next_releases(self) -> list[int]:
        """The oldest open ones, as many as fit into a call."""
        return list(islice(self._releases, MAX_ITEMS))

    def released(self, cache_ids: Sequence[int]) -> None:
        """These releases are answered."""
        for cache_id in cache_ids:
            self._releases.pop(cache_id, None)
        self._note()

    def _note(self) -> None:
        if self._arrived or self._releases:
            self.all_released.clear()
        else:
            self.all_released.set()


class CallNumbers:
    """Sequence numbers of one session's calls, and up to which all of them have ended."""

    def __init__(self) -> None:
        self._last = 0
        self._open: set[int] = set()

    def begin(self) -> tuple[int, int]:
        """(seq, acked_seq) of a new call."""
        acked = min(self._open, default=self._last + 1) - 1
        self._last += 1
        self._open.add(self._last)
        return self._last, acked

    def end(self, seq: int) -> None:
        """The call is over: answered, failed or given up."""
        self._open.remove(seq)
