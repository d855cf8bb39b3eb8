"""The figures of a run, computed from its records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clients.loadtest import records
from clients.loadtest.lengths import SpecError
from clients.loadtest.records import RequestRecord, RunRecord
from clients.percentiles import percentile

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
LATENCIES = ("ttft", "tpot", "itl", "e2e", "queue")
MAX_HONEST_LAG_S = 0.02  # beyond it the client, not the server, may be the limit


@dataclass(frozen=True)
class ServiceLevel:
    """Bounds in seconds that a good request keeps; None: no bound."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def kept_by(self, record: RequestRecord) -> bool:
        """Whether a request was answered, not wrongly, and within every bound."""
        if record.status != records.OK:
            return False
        pairs = ((self.ttft_s, record.ttft_s), (self.tpot_s, record.tpot_s), (self.e2e_s, record.e2e_s))
        return all(bound is None or value is None or value <= bound for bound, value in pairs)


def parse_service_level(text: str) -> ServiceLevel:
    """ttft=S,tpot=S,e2e=S, any of them; raises SpecError otherwise."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            bounds[name + "_s"] = float(value)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2e") or bounds[name + "_s"] <= 0:
            raise SpecError(f"{text!r} is no service level; write bounds in seconds, as in ttft=1,tpot=0.1,e2e=30")
    return ServiceLevel(**bounds)


def summarize(run: RunRecord, level: ServiceLevel, warmup_s: float = 0.0) -> dict[str, Any]:
    """All figures, as an object for JSON; requests that were due before warmup_s are left out."""
    measured = [record for record in run.requests if record.due_s >= warmup_s]
    answered = [record for record in measured if record.status in (records.OK, records.WRONG)]
    end_s = max((record.ended_s for record in measured), default=run.ended_s)
    window_s = max(end_s - warmup_s, 1e-9)
    due_s = max(run.duration_s - warmup_s, 1e-9)
    num_good = sum(level.kept_by(record) for record in measured)
    prompt_tokens = sum(record.num_prompt_tokens for record in measured)
    statuses = Counter(record.status for record in measured)
    return {
        "label": run.label,
        "window_s": window_s,
        "requests": {
            "due": len(measured),
            "ok": statuses[records.OK],
            "checked": sum(record.right is not None for record in measured),
            "wrong": statuses[records.WRONG],
            "failed": sum(count for status, count in statuses.items() if status not in records.PLANNED),
            "resumed": sum(record.num_resumptions > 0 for record in measured),
            "resumed_inexactly": sum(not record.exact for record in measured),
        },
        "statuses": dict(sorted(statuses.items())),
        "latency_s": {name: _distribution(_values(name, answered)) for name in LATENCIES},
        "throughput": {
            "offered_requests_per_s": len(measured) / due_s,
            "requests_per_s": len(answered) / window_s,
            "output_tokens_per_s": sum(record.num_output_tokens for record in measured) / window_s,
            "prompt_tokens_per_s": prompt_tokens / window_s,
        },
        "service_level": {"ttft_s": level.ttft_s, "tpot_s": level.tpot_s, "e2e_s": level.e2e_s},
        "goodput_requests_per_s": num_good / window_s,
        "good_share": num_good / len(measured) if measured else 0.0,
        "cached_token_share": _share(sum(record.num_cached_tokens for record in measured), prompt_tokens),
        "targets": dict(sorted(Counter(record.target for record in measured if record.target).items())),
        "client": _client(run, measured, warmup_s),
        "pool": _pool(run),
    }


def failures(summary: dict[str, Any]) -> list[str]:
    """Why a run did not pass, in words; empty when every answer came and none was wrong."""
    why = [
        f"{count} requests: {status}" for status, count in summary["statuses"].items() if status not in records.PLANNED
    ]
    if summary["requests"]["resumed_inexactly"]:
        why.append(f"{summary['requests']['resumed_inexactly']} streams went on at a decoder that computes differently")
    return why


def _values(name: str, answered: Iterable[RequestRecord]) -> list[float]:
    if name == "itl":
        return [gap for record in answered for gap in record.itls_s]
    found = (getattr(record, f"{name}_s") for record in answered)
    return [value for value in found if value is not None]


def _distribution(values: Sequence[float]) -> dict[str, float | int | None]:
    ordered = sorted(values)
    result: dict[str, float | int | None] = {"count": len(ordered)}
    for name, share in SHARES.items():
        result[name] = percentile(ordered, share) if ordered else None
    result["mean"] = sum(ordered) / len(ordered) if ordered else None
    result["max"] = ordered[-1] if ordered else None
    return result


def _client(run: RunRecord, measured: Sequence[RequestRecord], warmup_s: float) -> dict[str, Any]:
    lags = [lag for at_s, lag in run.lags if at_s >= warmup_s]
    late = [record.sent_s - record.due_s for record in measured]
    lag, dispatch = _distribution(lags), _distribution(late)
    worst = max(lag["p99"] or 0.0, dispatch["p99"] or 0.0)
    return {"lag_s": lag, "dispatch_lag_s": dispatch, "was_the_limit": worst > MAX_HONEST_LAG_S}


def _pool(run: RunRecord) -> dict[str, Any] | None:
    if not run.pool:
        return None
    peak = max(run.pool, key=lambda sample: sample.leased + sample.sealed)
    last = run.pool[-1]
    return {
        "num_blocks": last.num_blocks,
        "peak_in_use": peak.leased + peak.sealed,
        "peak_at_s": peak.time_s,
        "leased_at_end": last.leased,
        "leases_at_end": last.num_leases,
        "quarantined_at_end": last.quarantined,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
