"""Launches as compiled functions, by the exact shape of their batch: MLX builds no graph for a shape that it has seen a few times."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx
import structlog

_log = structlog.get_logger(__name__)
_SIGHTINGS = 3  # of a shape before it is worth compiling
_MOST_SHAPES = 512  # a server that meets more begins anew

Launch = Callable[[mx.array, mx.array], mx.array]


class CompiledSteps:
    """A launch is run as it is until its shape was seen a few times, then compiled; one that fails so is never compiled again.

    `clear` forgets everything: compiled functions, sightings and the failure. What is compiled may hold on to old buffers, so it is
    called before they go.
    """

    def __init__(self, compile_launch: Callable[[Launch], Launch] = mx.compile) -> None:
        self._compile = compile_launch
        self._seen: dict[Hashable, int] = {}
        self._compiled: dict[Hashable, Launch] = {}
        self._failed = False

    def __len__(self) -> int:
        return len(self._compiled)

    def submit(self, shape: Hashable, launch: Launch, table: mx.array, previous: mx.array) -> mx.array:
        """Starts a launch of this shape and answers its result, which the GPU may still be computing."""
        if not self._failed and self._is_warm(shape):
            try:
                compiled = self._compiled.get(shape)
                if compiled is None:
                    compiled = self._compiled[shape] = self._compile(launch)
                return _submitted(compiled(table, previous))
            except Exception as error:  # whatever it is: the plain way works, or says what is wrong
                self._failed = True
                self._compiled.clear()
                _log.warning(
                    "compiled_step_failed", error=str(error), means="steps are launched uncompiled from now on"
                )
        return _submitted(launch(table, previous))

    def clear(self) -> None:
        """Forgets everything."""
        self._seen.clear()
        self._compiled.clear()
        self._failed = False

    def _is_warm(self, shape: Hashable) -> bool:
        if len(self._seen) >= _MOST_SHAPES and shape not in self._seen:
            self.clear()
        count = self._seen.get(shape, 0)
        self._seen[shape] = count + 1
        return count >= _SIGHTINGS


def _submitted(result: Any) -> mx.array:
    mx.async_eval(result)  # type: ignore[no-untyped-call]
    array: mx.array = result
    return array
