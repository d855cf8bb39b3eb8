"""Brings the engine's events, made on its thread, to the streams of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.decoder.errors import DuplicateRequestError
from services.decoder.request import Event, Failed, Finished, request_id_of


class EventQueue:
    """What has come for one request's samples. One task takes it; an asyncio.Queue would cost three times as much a token."""

    __slots__ = ("_came", "_loop", "_taker")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._came: dict[str, list[Event]] = {}
        self._taker: asyncio.Future[None] | None = None

    def put(self, sample_id: str, event: Event) -> None:
        """One more event."""
        came = self._came.get(sample_id)
        if came is None:
            self._came[sample_id] = [event]
        else:
            came.append(event)
        taker, self._taker = self._taker, None
        if taker is not None and not taker.done():  # it is done when its task was cancelled
            taker.set_result(None)

    async def take(self) -> dict[str, list[Event]]:
        """Waits for an event, and takes all that are there, by the engine's id of their sample in the order of their first."""
        while not self._came:
            self._taker = self._loop.create_future()
            await self._taker
        came, self._came = self._came, {}
        return came


class EventRouter:
    """One queue for each client's request that the engine has, however many samples. Its methods but `emit` are the loop's only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # None: nobody listens any more, but the engine has not ended the request yet. The id stays taken until then, so that a late
        # event cannot reach another request of the same id.
        self._queues: dict[str, EventQueue | None] = {}
        self._some_ended = asyncio.Event()  # replaced by another each time

    def emit(self, events: Sequence[tuple[str, Event]]) -> None:
        """Called by the engine's thread once a step: one wake-up of the loop, however many requests there are."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    def open(self, sample_ids: Sequence[str]) -> EventQueue:
        """The queue of a new request's samples; raises DuplicateRequestError while another one has one of the ids."""
        for sample_id in sample_ids:
            if sample_id in self._queues:
                name = request_id_of(sample_id)
                raise DuplicateRequestError(f"request_id: a request {name!r} is running; choose another id")
        queue = EventQueue(self._loop)
        self._queues.update(dict.fromkeys(sample_ids, queue))
        return queue

    def forget(self, sample_ids: Sequence[str]) -> None:
        """Takes back an `open` whose request the engine did not take."""
        for sample_id in sample_ids:
            del self._queues[sample_id]

    def stop_listening(self, request_id: str) -> bool:
        """Drops whatever still comes for a sample; False when it had ended, or nobody listened any more."""
        if self._queues.get(request_id) is None:
            return False
        self._queues[request_id] = None
        return True

    async def until_let_go(self, sample_ids: Sequence[str]) -> None:
        """Returns when the engine has ended whatever of these nobody listens to any more: at its next step boundary."""
        while any(sample_id in self._queues and self._queues[sample_id] is None for sample_id in sample_ids):
            await self._some_ended.wait()

    def _deliver(self, events: Sequence[tuple[str, Event]]) -> None:
        for request_id, event in events:
            queue = self._queues.get(request_id)
            if queue is not None:
                queue.put(request_id, event)
            if isinstance(event, (Finished, Failed)):
                self._queues.pop(request_id, None)
                self._some_ended.set()
        if self._some_ended.is_set():
            self._some_ended = asyncio.Event()
