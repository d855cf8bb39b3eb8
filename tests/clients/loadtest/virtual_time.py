"""An event loop whose clock jumps to the next timer: a test of minutes takes no time, and every time in it is exact."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            self.now += timeout
        elif timeout is None:
            raise AssertionError("everything waits and no timer is set: this would hang")
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Nothing outside of the loop may be waited for: no sockets, threads or processes."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        # The loop takes two times that are closer than this for the same; its default is the real clock's tick.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now


def run_in_virtual_time(main: Coroutine[Any, Any, _T]) -> _T:
    """What `main` returns, run on a clock that jumps."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
