"""One run as one HTML file that needs nothing else: figures, and plots over time."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from clients.loadtest.figures import LATENCIES, SHARES, failures
from clients.loadtest.plots import (
    Series,
    binned,
    line_chart,
    linear_axis,
    log_axis,
    percentile_chart,
    scatter_chart,
    stacked_chart,
    steps,
    time_axis,
)
from clients.loadtest.records import CANCELLED, DEADLINE, OK, RunRecord
from clients.loadtest.tables import level_text, seconds
from clients.percentiles import percentile

_STYLE = """
:root{--bg:#fff;--ink:#1a1d21;--soft:#5b6470;--line:#e3e6ea;--card:#f7f8fa;--bad:#b3261e;--good:#1b7f3b;
--c1:#2563eb;--c2:#d97706;--c3:#0f9d76;--c4:#9333ea;--c5:#dc2680;--c6:#78838f}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e8eaed;--soft:#9aa4b0;--line:#2b3138;--card:#1b1f25;
--bad:#ff8a80;--good:#6fd08c;--c1:#6ea8fe;--c2:#f0a33a;--c3:#35c99b;--c4:#c084fc;--c5:#f472b6;--c6:#98a3af}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1120px;padding:28px 20px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}h1{font-size:22px;margin:0 0 2px}
h2{font-size:15px;margin:0 0 6px}p.sub{color:var(--soft);margin:0 0 20px}.verdict{font-weight:600}
.bad{color:var(--bad)}.good{color:var(--good)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:0 0 20px}
.tile,.plot,.wide{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:20px;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:14px}.wide{margin:0 0 14px;overflow-x:auto}
@media(max-width:480px){.plots{grid-template-columns:1fr}}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{text-align:right;padding:4px 10px}
th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-weight:500}
tbody tr{border-top:1px solid var(--line)}svg{width:100%;height:auto;display:block}
.grid{stroke:var(--line)}.tick{fill:var(--soft);font-size:11px}.mark line{stroke:var(--bad);stroke-dasharray:4 3}
.mark text{fill:var(--bad);font-size:10px}polyline{fill:none;stroke-width:1.7;stroke-linejoin:round}circle{opacity:.55}
.band{opacity:.85}.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:12px;color:var(--soft);min-height:18px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
pre{font-size:12px;overflow-x:auto;margin:0}
""" + "".join(
    f".s{n}{{stroke:var(--c{n})}}.f{n}{{fill:var(--c{n})}}.legend .b{n}{{background:var(--c{n})}}" for n in range(1, 7)
)

_MAX_BINS = 120


def render(run: RunRecord, summary: dict[str, Any]) -> str:
    """The whole page."""
    title = f"leasehold loadtest{': ' + run.label if run.label else ''}"
    plots = "".join(f'<div class="plot"><h2>{escape(name)}</h2>{chart}</div>' for name, chart in _plots(run) if chart)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{_verdict(run, summary)}{_tiles(summary)}"
        f'<div class="wide">{_latency_table(summary)}</div><div class="plots">{plots}</div>'
        f'<div class="wide" style="margin-top:14px"><h2>Statuses and settings</h2>{_details(run, summary)}</div>'
        "</body></html>\n"
    )


def _verdict(run: RunRecord, summary: dict[str, Any]) -> str:
    why = failures(summary)
    client = summary["client"]
    text = (
        f'<span class="verdict bad">Failed: {escape("; ".join(why))}.</span>'
        if why
        else '<span class="verdict good">Every request ended as it should.</span>'
    )
    if client["was_the_limit"]:
        text += ' <span class="verdict bad">The client was the limit: the latencies are partly its own.</span>'
    return (
        f'<p class="sub">{text} {summary["requests"]["due"]} requests in {run.ended_s:.1f} s; '
        f"client lag p99 {seconds(client['lag_s']['p99'])}. Latencies count from when a request was due.</p>"
    )


def _tiles(summary: dict[str, Any]) -> str:
    latency, throughput = summary["latency_s"], summary["throughput"]
    requests = summary["requests"]
    tiles = [
        (f"{throughput['output_tokens_per_s']:.0f}", "output tokens/s"),
        (f"{throughput['requests_per_s']:.2f}", "requests/s"),
        (seconds(latency["ttft"]["p50"]), f"TTFT p50 (p99 {seconds(latency['ttft']['p99'])})"),
        (seconds(latency["tpot"]["p50"]), f"TPOT p50 (p99 {seconds(latency['tpot']['p99'])})"),
        (f"{summary['good_share']:.1%}", f"goodput, {level_text(summary)}"),
        (f"{summary['cached_token_share']:.0%}", "prompt tokens cached"),
        (f"{requests['checked'] - requests['wrong']}/{requests['checked']}", "checked answers right"),
    ]
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _latency_table(summary: dict[str, Any]) -> str:
    keys = (*SHARES, "mean", "max")
    head = "".join(f"<th>{key}</th>" for key in ("", *keys))
    rows = "".join(
        f"<tr><td>{'queue time' if name == 'queue' else name.upper()}</td>"
        + "".join(f"<td>{seconds(summary['latency_s'][name][key])}</td>" for key in keys)
        + "</tr>"
        for name in LATENCIES
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _plots(run: RunRecord) -> list[tuple[str, str]]:
    return [
        ("Latency by percentile", _percentiles(run)),
        ("TTFT of each request, by when it was due", _ttft_scatter(run)),
        ("Output tokens/s", _throughput(run)),
        ("Requests in flight", _in_flight(run)),
        (f"Pool blocks in use by state, of {run.pool[-1].num_blocks if run.pool else 0}", _pool(run)),
        ("Step time by part (share of each second)", _steps(run)),
        ("Client's own lag", _lag(run)),
    ]


def _percentiles(run: RunRecord) -> str:
    answered = [record for record in run.requests if record.status == OK]
    ttfts = [record.ttft_s for record in answered if record.ttft_s is not None]
    tpots = [record.tpot_s for record in answered if record.tpot_s is not None]
    itls = [gap for record in answered for gap in record.itls_s]
    return percentile_chart(
        [("E2E", 4, [record.e2e_s for record in answered]), ("TTFT", 1, ttfts), ("ITL", 2, itls), ("TPOT", 3, tpots)]
    )


def _ttft_scatter(run: RunRecord) -> str:
    good = [(r.due_s, r.ttft_s) for r in run.requests if r.ttft_s is not None and r.status in (OK, CANCELLED, DEADLINE)]
    bad = [
        (r.due_s, r.ttft_s if r.ttft_s is not None else max(r.e2e_s, 1e-3))
        for r in run.requests
        if r.status not in (OK, CANCELLED, DEADLINE)
    ]
    heights = [max(height, 1e-6) for _, height in good + bad]
    if not heights:
        return ""
    series = [Series("as it should", 1, good), Series("failed or wrong", 5, bad)]
    return scatter_chart(series, time_axis(max(run.ended_s, 0.1)), log_axis(min(heights), max(heights)), run.marks)


def _throughput(run: RunRecord) -> str:
    bins = _num_bins(run)
    pairs = [
        (at, float(count))
        for record in run.requests
        for at, count in zip(record.arrivals_s, record.arrival_counts, strict=True)
    ]
    width = max(run.ended_s, 1e-9) / bins
    points = [(at, total / width) for at, total in binned(pairs, run.ended_s, bins, sum)]
    high = max((value for _, value in points), default=1.0)
    return line_chart(
        [Series("tokens/s", 1, points)], time_axis(max(run.ended_s, 0.1)), linear_axis(max(high, 1.0)), run.marks
    )


def _in_flight(run: RunRecord) -> str:
    changes = sorted([(r.sent_s, 1) for r in run.requests] + [(r.ended_s, -1) for r in run.requests])
    level, points = 0, [(0.0, 0.0)]
    for at, change in changes:
        level += change
        points.append((at, float(level)))
    high = max(value for _, value in points)
    return line_chart(
        [Series("in flight", 2, steps(points))],
        time_axis(max(run.ended_s, 0.1)),
        linear_axis(max(high, 1.0)),
        run.marks,
    )


def _pool(run: RunRecord) -> str:
    if not run.pool:
        return ""
    names = (("leased", 1), ("sealed", 3), ("cached", 4), ("quarantined", 5))
    series = [
        Series(name, colour, [(sample.time_s, float(getattr(sample, name))) for sample in run.pool])
        for name, colour in names
    ]
    high = max(sample.num_blocks - sample.free for sample in run.pool)
    return stacked_chart(series, time_axis(max(run.ended_s, 0.1)), linear_axis(max(high, 1)), run.marks)


def _steps(run: RunRecord) -> str:
    if not run.steps:
        return ""
    parts = sorted({part for sample in run.steps for part in sample.parts})[:6]
    series = [
        Series(part, number + 1, [(sample.time_s, sample.parts.get(part, 0.0)) for sample in run.steps])
        for number, part in enumerate(parts)
    ]
    high = max(sum(sample.parts.values()) for sample in run.steps)
    return stacked_chart(series, time_axis(max(run.ended_s, 0.1)), linear_axis(max(high, 0.01)), run.marks)


def _lag(run: RunRecord) -> str:
    if not run.lags:
        return ""
    points = binned(run.lags, run.ended_s, _num_bins(run), lambda found: percentile(found, 0.99) if found else math.nan)
    high = max((value for _, value in points if not math.isnan(value)), default=0.0)
    return line_chart(
        [Series("p99 of each stretch", 6, [(at, value * 1000) for at, value in points])],
        time_axis(max(run.ended_s, 0.1)),
        linear_axis(max(high * 1000, 1.0), " ms"),
        run.marks,
    )


def _details(run: RunRecord, summary: dict[str, Any]) -> str:
    lines = [f"{count:8d}  {status}" for status, count in summary["statuses"].items()]
    messages = list(dict.fromkeys(record.message for record in run.requests if record.message))
    lines += [f"          {message[:300]}" for message in messages[:20]]
    lines += [
        "",
        *(f"{key}: {value}" for key, value in run.settings.items() if value not in ("", "None", "[]", "False")),
    ]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _num_bins(run: RunRecord) -> int:
    return max(1, min(_MAX_BINS, round(run.ended_s * 2)))
