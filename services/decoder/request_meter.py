"""What a decoder's clients see of their requests: waits, latencies and outcomes. Touched by the event loop only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.decoder.errors import DecoderError
from services.decoder.request import Admitted, Event, Token
from services.metrics import Histogram

# How a request ended. Refused: before it came to the engine.
OUTCOMES = ("stop", "length", "cancelled", "disconnected", "failed", "refused")


class RequestFigures:
    """All requests of a decoder, together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.ttft = Histogram()
        self.tpot = Histogram()
        self.itl = Histogram()
        self.e2e = Histogram()
        self.queue = Histogram()
        self.num_waiting = 0
        self.num_running = 0
        self.outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self.errors: Counter[str] = Counter()
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    def request(self) -> RequestMeter:
        """A request has arrived."""
        return RequestMeter(self)


@dataclass(slots=True)
class _Pace:
    """When the tokens of one sample came."""

    first: float
    last: float
    num_tokens: int = 1


class RequestMeter:
    """One request, from its arrival on. A resumed one counts what it does here, not what another decoder did before."""

    def __init__(self, figures: RequestFigures) -> None:
        self._figures = figures
        self._arrived = self._submitted = figures.clock()
        self._paces: dict[str, _Pace] = {}  # of each sample that has a token
        self._num_prompt_tokens = 0
        self._is_waiting = False
        self._is_running = False
        self.cache_id = 0  # of the latest lease; 0: none yet

    def submit(self, num_prompt_tokens: int) -> None:
        """The engine has it now."""
        self._submitted = self._figures.clock()
        self._num_prompt_tokens = num_prompt_tokens
        self._is_waiting = True
        self._figures.num_waiting += 1

    def take(self, events: Mapping[str, Sequence[Event]]) -> None:
        """The engine's events for its samples have come. The first sample that is admitted counts for all."""
        now = self._figures.clock()
        for sample_id, came in events.items():
            for event in came:
                if isinstance(event, Token):
                    self._take_token(sample_id, now)
                elif isinstance(event, Admitted) and not self._is_running:
                    self._admit(event, now)

    def _take_token(self, sample_id: str, now: float) -> None:
        pace = self._paces.get(sample_id)
        if pace is not None:
            self._figures.itl.observe(now - pace.last)
            pace.last = now
            pace.num_tokens += 1
            return
        if not self._paces:
            self._figures.ttft.observe(now - self._arrived)
        self._paces[sample_id] = _Pace(now, now)

    def _admit(self, admitted: Admitted, now: float) -> None:
        figures = self._figures
        self.cache_id = admitted.cache_id
        self._leave_queue()
        self._is_running = True
        figures.num_running += 1
        figures.queue.observe(now - self._submitted)
        figures.num_prompt_tokens += self._num_prompt_tokens
        figures.num_cached_tokens += admitted.num_cached_tokens

    def end(self, outcome: str, error: DecoderError | None = None) -> None:
        """It is over, whatever ended it; one of OUTCOMES. Only whole answers count in the latencies of requests."""
        figures = self._figures
        self._leave_queue()
        figures.num_running -= self._is_running
        self._is_running = False
        figures.outcomes[outcome] += 1
        if error is not None:
            figures.errors[error.reason] += 1
        if outcome in ("stop", "length"):
            figures.e2e.observe(figures.clock() - self._arrived)
            for pace in self._paces.values():
                if pace.num_tokens > 1:
                    figures.tpot.observe((pace.last - pace.first) / (pace.num_tokens - 1))

    def _leave_queue(self) -> None:
        self._figures.num_waiting -= self._is_waiting
        self._is_waiting = False
