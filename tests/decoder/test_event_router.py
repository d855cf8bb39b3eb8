"""The way of events from the engine's thread to the task that serves their request."""

from __future__ import annotations

import asyncio
import threading

from services.decoder.event_router import EventRouter
from services.decoder.request import Admitted, Event, Finished, FinishReason, Token

TIMEOUT_S = 30.0


async def test_a_task_that_lags_takes_all_that_has_come_by_sample_and_in_order() -> None:
    router = EventRouter(asyncio.get_running_loop())
    queue = router.open(["one", "two"])
    steps: list[list[tuple[str, Event]]] = [
        [("one", Admitted(0, None)), ("two", Admitted(0, None))],
        [("two", Token(0, 7, None)), ("one", Token(0, 8, None))],
        [("one", Token(1, 9, None)), ("two", Finished(FinishReason.LENGTH, 1, 0))],
    ]
    engine = threading.Thread(target=lambda: [router.emit(step) for step in steps])
    engine.start()
    engine.join()
    delivered = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(delivered.set_result, None)  # after all that the engine has handed over
    await delivered
    came = await queue.take()
    assert list(came.items()) == [
        ("one", [Admitted(0, None), Token(0, 8, None), Token(1, 9, None)]),
        ("two", [Admitted(0, None), Token(0, 7, None), Finished(FinishReason.LENGTH, 1, 0)]),
    ]


async def test_a_task_that_waits_is_woken_for_each_step() -> None:
    router = EventRouter(asyncio.get_running_loop())
    queue = router.open(["one"])
    for position in range(3):
        taking = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        assert not taking.done()
        router.emit([("one", Token(position, 7, None))])
        assert await asyncio.wait_for(taking, TIMEOUT_S) == {"one": [Token(position, 7, None)]}


async def test_a_cancelled_wait_loses_no_event() -> None:
    router = EventRouter(asyncio.get_running_loop())
    queue = router.open(["one"])
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.wait([taking])
    router.emit([("one", Token(0, 7, None))])
    assert await asyncio.wait_for(queue.take(), TIMEOUT_S) == {"one": [Token(0, 7, None)]}
