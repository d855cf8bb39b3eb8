"""Brings the engine's events, made on its thread, to the streams of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.decoder.errors import DuplicateRequestError
from services.decoder.request import Event, Failed, Finished


class EventRouter:
    """One queue for each request that the engine has. Its methods but `emit` are for the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # None: nobody listens any more, but the engine has not ended the request yet. The id stays taken until then, so that a late
        # event cannot reach another request of the same id.
        self._queues: dict[str, asyncio.Queue[Event] | None] = {}

    def emit(self, events: Sequence[tuple[str, Event]]) -> None:
        """Called by the engine's thread once a step: one wake-up of the loop, however many requests there are."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    def open(self, request_id: str) -> asyncio.Queue[Event]:
        """The queue of a new request; raises DuplicateRequestError while another one has the id."""
        if request_id in self._queues:
            raise DuplicateRequestError(f"request_id: a request {request_id!r} is running; choose another id")
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._queues[request_id] = queue
        return queue

    def forget(self, request_id: str) -> None:
        """Takes back an `open` whose request the engine did not take."""
        del self._queues[request_id]

    def stop_listening(self, request_id: str) -> bool:
        """Drops whatever still comes for a request; False when it had ended."""
        if request_id not in self._queues:
            return False
        self._queues[request_id] = None
        return True

    def _deliver(self, events: Sequence[tuple[str, Event]]) -> None:
        for request_id, event in events:
            queue = self._queues.get(request_id)
            if queue is not None:
                queue.put_nowait(event)
            if isinstance(event, (Finished, Failed)):
                self._queues.pop(request_id, None)


async def next_events(queue: asyncio.Queue[Event]) -> list[Event]:
    """Waits for an event, and takes all that are there."""
    events = [await queue.get()]
    while not queue.empty():
        events.append(queue.get_nowait())
    return events
