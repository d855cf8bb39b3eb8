"""The two long-lived streams: keepalives, which also carry revocations at once, and events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from protos import kv_manager_pb2 as pb
from services.kv_manager import translate
from services.kv_manager.block_pool import BlockPool
from services.kv_manager.errors import StoppingError
from services.kv_manager.events import Event
from services.kv_manager.lessor import Lessor
from services.kv_manager.sessions import REVOKED, Session

_EVENTS_A_MESSAGE = 1024


class KeepAliveStreams:
    """All open keepalive streams."""

    def __init__(self, lessor: Lessor, stopping: asyncio.Event, wake_ticker: Callable[[], None]) -> None:
        """wake_ticker is called when a stream has ended, so that its worker's lock is looked at soon."""
        self._lessor = lessor
        self._stopping = stopping
        self._wake_ticker = wake_ticker
        self._revocations: dict[Session, set[asyncio.Event]] = {}
        lessor.waiting.on_revoked = self._tell

    def _tell(self, session: Session) -> None:
        for event in self._revocations.get(session, ()):
            event.set()

    async def serve(self, requests: AsyncIterator[pb.KeepAliveRequest]) -> AsyncGenerator[pb.KeepAliveResponse, None]:
        """One reply for each request, and one more whenever a lease is revoked in between.

        Raises StaleEpochError when the worker has to register, and StoppingError when the manager stops.
        """
        session: Session | None = None
        revoked = asyncio.Event()
        reader = asyncio.ensure_future(anext(requests, None))
        watcher = asyncio.ensure_future(revoked.wait())
        stopper = asyncio.ensure_future(self._stopping.wait())
        try:
            while True:
                await asyncio.wait((reader, watcher, stopper), return_when=asyncio.FIRST_COMPLETED)
                _require_running(self._stopping)
                if reader.done():
                    request = reader.result()
                    if request is None:
                        return
                    busy_ms = request.busy_ms if request.HasField("busy_ms") else None
                    present = self._lessor.keepalive(request.worker_id, request.epoch, busy_ms)
                    session = self._follow(session, present, revoked)
                    reader = asyncio.ensure_future(anext(requests, None))
                if watcher.done():
                    revoked.clear()
                    watcher = asyncio.ensure_future(revoked.wait())
                if session is not None:
                    yield self._reply(session)
        finally:
            for task in (reader, watcher, stopper):
                task.cancel()
            self._forget(session, revoked)
            if session is not None:
                self._lessor.stream_ended(session)
                self._wake_ticker()

    def _follow(self, before: Session | None, now: Session, revoked: asyncio.Event) -> Session:
        if now is not before:
            self._forget(before, revoked)
            self._revocations.setdefault(now, set()).add(revoked)
        return now

    def _forget(self, session: Session | None, revoked: asyncio.Event) -> None:
        if session is None:
            return
        events = self._revocations.get(session, set())
        events.discard(revoked)
        if not events:
            self._revocations.pop(session, None)

    def _reply(self, session: Session) -> pb.KeepAliveResponse:
        return pb.KeepAliveResponse(
            epoch=session.epoch,
            revoked_cache_ids=self._lessor.revoked_cache_ids(session),
            session_revoked=session.state == REVOKED,
        )


def _require_running(stopping: asyncio.Event) -> None:
    if stopping.is_set():
        raise StoppingError("the manager is stopping; connect again")


async def watch(
    lessor: Lessor, stopping: asyncio.Event, incarnation: bytes, cursor: int
) -> AsyncGenerator[pb.WatchEventsResponse, None]:
    """Events from the cursor on, for ever; whenever they are gone from the ring, `cleared` and a snapshot first.

    Raises StoppingError when the manager stops.
    """
    ring = lessor.events
    news = asyncio.Event()
    ring.listeners.add(news.set)
    stopper = asyncio.create_task(_set_with(stopping, news))
    try:
        while True:
            _require_running(stopping)
            news.clear()
            if not ring.reaches(incarnation, cursor):
                # Taken in one go, with the cursor that belongs to it; told in slices.
                snapshot, incarnation, cursor = _snapshot(lessor.pool), ring.incarnation, ring.cursor
                for first in range(0, max(len(snapshot), 1), _EVENTS_A_MESSAGE):
                    is_last = first + _EVENTS_A_MESSAGE >= len(snapshot)
                    yield pb.WatchEventsResponse(
                        incarnation=incarnation,
                        cursor=cursor if is_last else 0,
                        cleared=first == 0,
                        events=[translate.event(event) for event in snapshot[first : first + _EVENTS_A_MESSAGE]],
                    )
                continue
            events = ring.after(cursor, _EVENTS_A_MESSAGE)
            if events:
                cursor += len(events)
                messages = [translate.event(event) for event in events]
                yield pb.WatchEventsResponse(incarnation=incarnation, cursor=cursor, events=messages)
            else:
                await news.wait()
    finally:
        ring.listeners.discard(news.set)
        stopper.cancel()


async def _set_with(first: asyncio.Event, second: asyncio.Event) -> None:
    await first.wait()
    second.set()


def _snapshot(pool: BlockPool | None) -> list[Event]:
    contents = [pool.content(block) for block in pool.sealed_blocks()] if pool is not None else []
    return [
        Event(True, content.content_hash, content.parent_hash, content.num_tokens) for content in contents if content
    ]
