"""Figures as plain text: of one run, of two side by side, of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clients.cli.terminal import table
from clients.loadtest.figures import LATENCIES, MAX_HONEST_LAG_S, SHARES, failures

_COMPARED = (
    ("requests/s", ("throughput", "requests_per_s"), 1),
    ("output tokens/s", ("throughput", "output_tokens_per_s"), 1),
    ("goodput requests/s", ("goodput_requests_per_s",), 1),
    ("good share", ("good_share",), 1),
    ("cached token share", ("cached_token_share",), 1),
    *((f"{name} {share}, s", ("latency_s", name, share), -1) for name in LATENCIES for share in SHARES),
    ("wrong answers", ("requests", "wrong"), -1),
    ("failed requests", ("requests", "failed"), -1),
    ("client lag p99, s", ("client", "lag_s", "p99"), -1),
)


def seconds(value: float | None) -> str:
    """A duration for people; a dash where there is none."""
    if value is None:
        return "-"
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 0.1:
        return f"{value:.3f} s"
    return f"{value * 1000:.2f} ms"


def run_text(summary: dict[str, Any]) -> str:
    """The table at the end of a run."""
    latencies = [
        [name.upper() if name != "queue" else "queue time", *(seconds(summary["latency_s"][name][key]) for key in keys)]
        for name in LATENCIES
        for keys in [(*SHARES, "mean", "max")]
    ]
    parts = [table(("", *SHARES, "mean", "max"), latencies), "\n".join(_lines(summary))]
    return "\n\n".join(parts)


def _lines(summary: dict[str, Any]) -> list[str]:
    requests, throughput, client = summary["requests"], summary["throughput"], summary["client"]
    lines = [
        f"requests       {requests['due']} due, {requests['ok']} answered, {requests['checked']} checked, "
        f"{requests['wrong']} wrong, {requests['failed']} failed, {requests['resumed']} resumed",
        f"throughput     {throughput['output_tokens_per_s']:.1f} tokens/s, {throughput['requests_per_s']:.2f} requests/s "
        f"of {throughput['offered_requests_per_s']:.2f} offered, {throughput['prompt_tokens_per_s']:.1f} prompt tokens/s",
        f"goodput        {summary['goodput_requests_per_s']:.2f} requests/s, {summary['good_share']:.1%} of all, "
        f"under {level_text(summary)}",
        f"cached tokens  {summary['cached_token_share']:.1%} of the prompts'",
    ]
    if len(summary["statuses"]) > 1:
        lines.append(
            "statuses       " + ", ".join(f"{count} {status}" for status, count in summary["statuses"].items())
        )
    if len(summary["targets"]) > 1:
        lines.append("targets        " + ", ".join(f"{count} {target}" for target, count in summary["targets"].items()))
    pool = summary["pool"]
    if pool is not None:
        lines.append(
            f"pool           {pool['peak_in_use']} of {pool['num_blocks']} blocks in use at most, "
            f"{pool['leased_at_end']} leased at the last look"
        )
    lines.append(
        f"client lag     p99 {seconds(client['lag_s']['p99'])}, sent late by p99 {seconds(client['dispatch_lag_s']['p99'])}"
    )
    if client["was_the_limit"]:
        lines.append(
            f"               the client was the limit (more than {MAX_HONEST_LAG_S * 1000:.0f} ms late): "
            "take these figures for the client's, and use more clients"
        )
    lines += [f"FAILED         {why}" for why in failures(summary)]
    return lines


def level_text(summary: dict[str, Any]) -> str:
    """The service level in words."""
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}
    bounds = [
        f"{names[key]} ≤ {seconds(value)}" for key, value in summary["service_level"].items() if value is not None
    ]
    return ", ".join(bounds) or "no service level but a right answer"


def compare_text(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Two runs side by side; the last column says which way a change of more than 2 % went."""
    rows = []
    for name, path, better in _COMPARED:
        left, right = _value(first, path), _value(second, path)
        if left is None and right is None:
            continue
        rows.append([name, _number(left), _number(right), *_change(left, right, better)])
    return table(("", first["label"] or "A", second["label"] or "B", "change", ""), rows)


def sweep_text(levels: Sequence[tuple[float, dict[str, Any]]], knee: float | None, unit: str) -> str:
    """The levels of a sweep and its knee."""
    rows = [
        [
            f"{load:g}",
            f"{summary['throughput']['requests_per_s']:.2f}",
            f"{summary['throughput']['output_tokens_per_s']:.1f}",
            seconds(summary["latency_s"]["ttft"]["p99"]),
            seconds(summary["latency_s"]["tpot"]["p99"]),
            seconds(summary["latency_s"]["e2e"]["p99"]),
            f"{summary['good_share']:.1%}",
        ]
        for load, summary in sorted(levels, key=lambda level: level[0])
    ]
    head = table((unit, "requests/s", "tokens/s", "TTFT p99", "TPOT p99", "E2E p99", "good"), rows)
    if knee is None:
        return f"{head}\n\nthe service level broke at every load"
    return f"{head}\n\nknee: {knee:g} {unit} is the highest load that kept the service level"


def _value(summary: dict[str, Any], path: Sequence[str]) -> float | None:
    value: Any = summary
    for key in path:
        value = value[key]
    return None if value is None else float(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _change(left: float | None, right: float | None, better: int) -> tuple[str, str]:
    if left is None or right is None:
        return "", ""
    if left == right:
        return "=", ""
    if left == 0:
        return "new", "better" if better > 0 else "worse"
    change = right / left - 1
    if abs(change) < 0.02:
        return f"{change:+.1%}", ""
    return f"{change:+.1%}", "better" if change * better > 0 else "worse"
