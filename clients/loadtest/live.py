"""What is shown while a load test runs: a few lines that are written over on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections import Counter

from clients.loadtest.driver import Driver
from clients.loadtest.records import PLANNED, UNFINISHED
from clients.loadtest.tables import seconds
from clients.percentiles import percentile

_TERMINAL_INTERVAL_S = 0.5
_PLAIN_INTERVAL_S = 5.0
_RECENT = 200  # requests that the shown percentiles are of
_BAR = 40


class Live:
    """The display of one driver, on stderr."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._terminal = sys.stderr.isatty()
        self._num_lines = 0
        self._tokens_before = 0
        self._before_s = 0.0

    async def show(self) -> None:
        """Draws again and again until cancelled."""
        try:
            while True:
                await asyncio.sleep(_TERMINAL_INTERVAL_S if self._terminal else _PLAIN_INTERVAL_S)
                self._draw(self.lines())
        finally:
            if self._terminal:
                self._draw([])

    def lines(self) -> list[str]:
        """What there is to say now; tokens/s are since the last time."""
        run, now_s = self._driver.run, self._driver.now_s()
        # The recent end of the list is enough: a run may have millions of requests.
        recent = run.requests[-_RECENT:]
        ttfts = [record.ttft_s for record in recent if record.ttft_s is not None]
        tpots = [record.tpot_s for record in recent if record.tpot_s is not None]
        rate = (self._driver.num_tokens - self._tokens_before) / max(now_s - self._before_s, 1e-9)
        self._tokens_before, self._before_s = self._driver.num_tokens, now_s
        bad = Counter(
            record.status
            for record in recent
            if record.ended_s and record.status not in PLANNED and record.status != UNFINISHED
        )
        lines = [
            f"{now_s:6.1f} s  {len(run.requests)} sent  {self._driver.num_in_flight} in flight  {rate:.0f} tokens/s  "
            f"TTFT p50 {_short(ttfts, 0.5)} p99 {_short(ttfts, 0.99)}  TPOT p50 {_short(tpots, 0.5)}"
        ]
        if bad:
            lines.append("          " + ", ".join(f"{count} {status}" for status, count in sorted(bad.items())))
        if run.pool and run.pool[-1].num_blocks:
            sample = run.pool[-1]
            lines.append(
                f"          pool [{_bar(sample.leased, sample.sealed, sample.cached, sample.num_blocks)}] "
                f"{sample.leased} leased {sample.sealed} sealed {sample.cached} cached {sample.free} free"
            )
        if run.marks:
            lines.append(f"          {run.marks[-1].time_s:.1f} s: {run.marks[-1].text}")
        return lines

    def _draw(self, lines: list[str]) -> None:
        if not self._terminal:
            print(" | ".join(line.strip() for line in lines), file=sys.stderr, flush=True)
            return
        # A line that wraps would be counted wrong, and leave its rest behind.
        width = shutil.get_terminal_size().columns
        lines = [line[: width - 1] for line in lines]
        up = f"\x1b[{self._num_lines}A" if self._num_lines else ""
        sys.stderr.write(up + "\x1b[J" + "".join(line + "\n" for line in lines))
        sys.stderr.flush()
        self._num_lines = len(lines)


def _short(values: list[float], share: float) -> str:
    return seconds(percentile(values, share)) if values else "-"


def _bar(leased: int, sealed: int, cached: int, total: int) -> str:
    text = "".join(mark * round(_BAR * count / total) for mark, count in (("#", leased), ("=", sealed), ("-", cached)))
    return text[:_BAR].ljust(_BAR, ".")
