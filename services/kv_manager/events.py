"""What was stored and removed, in a bounded ring that any number of watchers read at their own pace."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from services.kv_manager.meta_format import Content

_RING_EVENTS = 1 << 16


class Event(NamedTuple):
    """A content that can be found from now on, or (parent_hash empty, num_tokens 0) cannot any more."""

    is_stored: bool
    content_hash: bytes
    parent_hash: bytes
    num_tokens: int


class EventRing:
    """The newest events. A cursor is a place between two events of this incarnation."""

    def __init__(self, capacity: int = _RING_EVENTS) -> None:
        self.incarnation = secrets.token_bytes(16)
        self._ring: deque[Event] = deque(maxlen=capacity)
        self.cursor = 1  # 0 is nobody's place
        # Called after every event; must be quick and must not raise.
        self.listeners: set[Callable[[], None]] = set()

    def restart(self) -> None:
        """Everything is gone at once: watchers hear `cleared`, and go on in a new incarnation."""
        self.incarnation = secrets.token_bytes(16)
        self._ring.clear()
        for listener in self.listeners:
            listener()

    def stored(self, content: Content) -> None:
        """Notes that the content can be found."""
        self._append(Event(True, content.content_hash, content.parent_hash, content.num_tokens))

    def removed(self, content: Content) -> None:
        """Notes that the content cannot be found any more."""
        self._append(Event(False, content.content_hash, b"", 0))

    def _append(self, event: Event) -> None:
        self._ring.append(event)
        self.cursor += 1
        for listener in self.listeners:
            listener()

    def reaches(self, incarnation: bytes, cursor: int) -> bool:
        """Whether the events after the cursor are all here still."""
        return incarnation == self.incarnation and self.cursor - len(self._ring) <= cursor <= self.cursor

    def after(self, cursor: int, limit: int) -> list[Event]:
        """At most limit events from the cursor on; the caller has asked reaches."""
        skip = len(self._ring) - (self.cursor - cursor)
        return list(islice(self._ring, skip, skip + limit))
