"""What the engine has asked of the manager and the manager has not answered yet, across sessions."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from services.decoder.leases import AcquireAsk, ExtendAsk, ForkAsk, SealAsk

# Items in one call. A reply of as many full tables stays far below the message limit.
MAX_ITEMS = 256

_Ask = TypeVar("_Ask")


@dataclass(frozen=True)
class ReleaseAsk:
    """A whole lease, or the one block of it that a seal replaced."""

    cache_id: int
    block_id: int | None = None


Ask = AcquireAsk | ForkAsk | ExtendAsk | SealAsk | ReleaseAsk
SealKey = tuple[int, int]  # cache id, place in the table


class Outbox:
    """Asks, kept until they are answered: a new session sends again what the old one left open.

    The engine's thread only appends to `_arrived`; everything else belongs to the event loop. A Release withdraws the asks for its lease,
    and is sent even when the Acquire was not answered, because it may have been served. It waits for the seals that were asked before it:
    what is sealed stays cached, and a prefix hit later. An Acquire waits for those seals whose blocks it could hit, a Fork for those of
    the blocks that it is to share.
    """

    def __init__(self) -> None:
        self._arrived: deque[Ask] = deque()
        self.acquires: dict[int, AcquireAsk] = {}
        self.forks: dict[int, ForkAsk] = {}
        self.extends: dict[int, ExtendAsk] = {}
        self._seals: dict[SealKey, SealAsk] = {}
        self._num_seals: Counter[int] = Counter()  # open ones of each lease
        self._sealing: dict[bytes, SealKey] = {}  # open ones by content hash
        self._after_seals: dict[int, set[SealKey]] = {}  # Acquires and Forks by cache id: what they wait for
        self._releases: dict[ReleaseAsk, None] = {}  # a set in the order of arrival
        self._releases_after_seals: dict[int, None] = {}
        self.all_released = asyncio.Event()
        self.all_released.set()

    def put(self, ask: Ask) -> None:
        """Any thread."""
        self._arrived.append(ask)

    def sort(self) -> None:
        """Takes in what has arrived."""
        while self._arrived:
            ask = self._arrived.popleft()
            match ask:
                case AcquireAsk():
                    self.acquires[ask.cache_id] = ask
                    self._wait_for({self._sealing[known] for known in ask.prefix_hashes if known in self._sealing}, ask)
                case ForkAsk():
                    self.forks[ask.cache_id] = ask
                    places = ((ask.parent_cache_id, index) for index in range(ask.max_shared_blocks))
                    self._wait_for({place for place in places if place in self._seals}, ask)
                case ExtendAsk():
                    self.extends[ask.cache_id] = ask
                case SealAsk():
                    self._seals[ask.cache_id, ask.block_index] = ask
                    self._num_seals[ask.cache_id] += 1
                    self._sealing[ask.content_hash] = (ask.cache_id, ask.block_index)
                case ReleaseAsk(cache_id, None):
                    self.acquires.pop(cache_id, None)
                    self.forks.pop(cache_id, None)
                    self._after_seals.pop(cache_id, None)
                    self.extends.pop(cache_id, None)
                    if self._num_seals[cache_id]:
                        self._releases_after_seals[cache_id] = None
                    else:
                        self._releases[ask] = None
                case ReleaseAsk():
                    self._releases[ask] = None
        self._note()

    def next_acquires(self, without: Collection[int]) -> list[AcquireAsk]:
        """The oldest open ones, as many as fit into a call, without some cache ids."""
        return _first(self.acquires, {*without, *self._after_seals})

    def next_forks(self) -> list[ForkAsk]:
        """The oldest open ones, as many as fit into a call."""
        return _first(self.forks, self._after_seals)

    def next_extends(self, without: Collection[int]) -> list[ExtendAsk]:
        """The oldest open ones, as many as fit into a call, without some cache ids."""
        return _first(self.extends, without)

    def next_seals(self) -> list[SealAsk]:
        """The oldest open ones, as many as fit into a call; those of a table are front to back."""
        return list(islice(self._seals.values(), MAX_ITEMS))

    def next_releases(self) -> list[ReleaseAsk]:
        """The oldest open ones, as many as fit into a call."""
        return list(islice(self._releases, MAX_ITEMS))

    def end_seals(self, asks: Sequence[SealAsk]) -> None:
        """These are answered, or will never be."""
        for ask in asks:
            key = (ask.cache_id, ask.block_index)
            if self._seals.pop(key, None) is None:
                continue
            if self._sealing.get(ask.content_hash) == key:
                del self._sealing[ask.content_hash]
            for cache_id in [cache_id for cache_id, keys in self._after_seals.items() if key in keys]:
                self._after_seals[cache_id].discard(key)
                if not self._after_seals[cache_id]:
                    del self._after_seals[cache_id]
            self._num_seals[ask.cache_id] -= 1
            if not self._num_seals[ask.cache_id]:
                del self._num_seals[ask.cache_id]
                if ask.cache_id in self._releases_after_seals:
                    del self._releases_after_seals[ask.cache_id]
                    self._releases[ReleaseAsk(ask.cache_id)] = None
        self._note()

    def drop_seals(self) -> None:
        """The pool whose blocks were to be sealed is gone."""
        self.end_seals(list(self._seals.values()))

    def drop_block_releases(self) -> None:
        """A new session has only what was claimed, and of the blocks that a seal had replaced nothing.

        Asked again there, they might be given back when the same block has been replaced once more, and is read.
        """
        self.end_releases([ask for ask in self._releases if ask.block_id is not None])

    def end_releases(self, asks: Sequence[ReleaseAsk]) -> None:
        """These are answered."""
        for ask in asks:
            self._releases.pop(ask, None)
        self._note()

    def _wait_for(self, seals: set[SealKey], ask: AcquireAsk | ForkAsk) -> None:
        if seals:
            self._after_seals[ask.cache_id] = seals

    def _note(self) -> None:
        if self._arrived or self._releases or self._releases_after_seals:
            self.all_released.clear()
        else:
            self.all_released.set()


def _first(asks: Mapping[int, _Ask], without: Collection[int]) -> list[_Ask]:
    return list(islice((ask for cache_id, ask in asks.items() if cache_id not in without), MAX_ITEMS))


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
