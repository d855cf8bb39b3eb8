"""What a load test writes down: one record a request, samples of the pool and of the client, marks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

OK = "ok"
WRONG = "wrong answer"
CANCELLED = "cancelled as planned"
DEADLINE = "deadline as planned"
UNFINISHED = "unfinished at the end"
PLANNED = (OK, CANCELLED, DEADLINE)  # what a healthy server leaves


@dataclass(slots=True)
class RequestRecord:
    """One request; every time in seconds since the start of the run."""

    conversation: int
    turn: int
    due_s: float  # when the schedule wanted it; latencies count from here, whenever the client got to send it
    sent_s: float = 0.0
    started_s: float | None = None  # when a decoder had admitted it
    arrivals_s: list[float] = field(default_factory=list)  # of tokens, as they came
    arrival_counts: list[int] = field(default_factory=list)  # tokens in each arrival
    ended_s: float = 0.0
    status: str = UNFINISHED
    message: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    right: bool | None = None  # None: not checked
    target: str = ""
    tenant: str = ""
    priority: int = 0
    num_resumptions: int = 0
    exact: bool = True

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated."""
        return sum(self.arrival_counts)

    @property
    def ttft_s(self) -> float | None:
        """From due to the first token; None when none came."""
        return self.arrivals_s[0] - self.due_s if self.arrivals_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for fewer than two."""
        count = self.num_output_tokens
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (count - 1) if count > 1 else None

    @property
    def e2e_s(self) -> float:
        """From due to the end."""
        return self.ended_s - self.due_s

    @property
    def queue_s(self) -> float | None:
        """From due to the admission by a decoder."""
        return None if self.started_s is None else self.started_s - self.due_s

    @property
    def itls_s(self) -> list[float]:
        """Times between arrivals of tokens."""
        return [later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class PoolSample:
    """The pool at one time, in blocks."""

    time_s: float
    num_blocks: int
    free: int
    leased: int
    sealed: int
    cached: int
    quarantined: int
    num_leases: int
    num_sessions: int


@dataclass(frozen=True, slots=True)
class StepSample:
    """How a decoder spent its steps in one interval: seconds a second by part."""

    time_s: float
    target: str
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to the system on purpose."""

    time_s: float
    text: str


@dataclass
class RunRecord:
    """All of one run. `lags` are (time, seconds late) of the client's own event loop."""

    label: str
    settings: dict[str, Any]
    duration_s: float = 0.0  # of the arrivals
    ended_s: float = 0.0
    requests: list[RequestRecord] = field(default_factory=list)
    pool: list[PoolSample] = field(default_factory=list)
    steps: list[StepSample] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    lags: list[tuple[float, float]] = field(default_factory=list)


def to_lines(run: RunRecord, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each with its `type`; the summary comes last."""
    head = {
        "type": "run",
        "label": run.label,
        "settings": run.settings,
        "duration_s": run.duration_s,
        "ended_s": run.ended_s,
    }
    lines = [head]
    lines += [{"type": "request", **_rounded(asdict(record))} for record in run.requests]
    lines += [{"type": "pool", **_rounded(asdict(sample))} for sample in run.pool]
    lines += [{"type": "steps", **_rounded(asdict(sample))} for sample in run.steps]
    lines += [{"type": "mark", **_rounded(asdict(mark))} for mark in run.marks]
    lines += [{"type": "summary", **summary}]
    return lines


def _rounded(entry: dict[str, Any]) -> dict[str, Any]:
    """Times to 10 µs: more digits would only make the file longer."""
    return {key: _round(value) for key, value in entry.items()}


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, list):
        return [_round(item) for item in value]
    return value
