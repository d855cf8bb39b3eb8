"""Reads a service's Prometheus endpoint, and the few figures of a decoder that are shown to people."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

_HTTP_TIMEOUT_S = 2.0

_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

# What a decoder's endpoint calls its figures.
TOKENS_TOTAL = "leasehold_decoder_tokens_total"  # by phase
REQUESTS_WAITING = "leasehold_decoder_requests_waiting"
REQUESTS_RUNNING = "leasehold_decoder_requests_running"
STEP_SECONDS = "leasehold_decoder_step_seconds"  # a histogram: _sum and _count


@dataclass(frozen=True)
class DecoderFigures:
    """Totals and levels of one decoder at one time."""

    time_s: float
    num_tokens: float
    num_waiting: float
    num_running: float
    num_steps: float
    step_seconds: float


def decoder_figures(time_s: float, samples: list[tuple[str, dict[str, str], float]]) -> DecoderFigures:
    """The figures in the samples of an endpoint; 0 for one that it does not have."""

    def total(name: str) -> float:
        return sum(value for found, _, value in samples if found == name)

    return DecoderFigures(
        time_s,
        total(TOKENS_TOTAL),
        total(REQUESTS_WAITING),
        total(REQUESTS_RUNNING),
        total(STEP_SECONDS + "_count"),
        total(STEP_SECONDS + "_sum"),
    )


def step_parts(samples: list[tuple[str, dict[str, str], float]]) -> dict[str, float]:
    """Seconds that steps have taken so far, by part: every `*step*_seconds_sum` that has a label `part`."""
    return {
        labels["part"]: value
        for name, labels, value in samples
        if "step" in name and name.endswith("_seconds_sum") and "part" in labels
    }


async def scrape(address: str) -> list[tuple[str, dict[str, str], float]]:
    """The samples at http://ADDRESS/metrics in Prometheus' text format: (name, labels, value)."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(_HTTP_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            writer.write(f"GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
            await writer.drain()
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    if b" 200 " not in head.split(b"\r\n", 1)[0] + b" ":
        raise ValueError(f"{address} answered {head[:60]!r}")
    return parse_samples(body.decode(errors="replace"))


def parse_samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Prometheus' text format without its comments."""
    samples = []
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is not None:
            samples.append((match["name"], dict(_LABEL.findall(match["labels"] or "")), float(match["value"])))
    return samples
