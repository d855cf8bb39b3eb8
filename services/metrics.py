"""What both services need for a Prometheus endpoint: a histogram for one writing thread, and the endpoint itself."""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from services.serving import AddressError, check_address

FLAG = "--metrics-listen"
PATH = "/metrics"

# Upper bounds in seconds: of what a caller waits for, and of parts of a step.
LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
FAST_BOUNDS = (
    0.00001,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_HEAD_BYTES = 8192
_HEAD_TIMEOUT_S = 5.0


class Histogram:
    """Counts values by upper bound. One thread observes, any may read: the library's own takes a lock for every value."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float] = LATENCY_BOUNDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    @property
    def sum(self) -> float:
        """All values together."""
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, number of values up to it), as Prometheus wants them."""
        total = 0
        buckets = []
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


def histogram_family(
    name: str, documentation: str, histograms: Mapping[str, Histogram], label: str | None = None
) -> HistogramMetricFamily:
    """Histograms as one metric, by the value of a label; without a label there is one, under ""."""
    family = HistogramMetricFamily(name, documentation, labels=[label] if label else [])
    for value, histogram in histograms.items():
        family.add_metric([value] if label else [], histogram.buckets(), histogram.sum)
    return family


def check_metrics_address(address: str) -> str:
    """The address unchanged, if it is HOST:PORT; raises AddressError naming the flag otherwise."""
    if address.startswith("unix:"):
        raise AddressError(
            f"{FLAG}: {address!r} is a socket file, and Prometheus speaks HTTP over TCP; write HOST:PORT"
        )
    return check_address(FLAG, address)


class MetricsEndpoint:
    """GET /metrics over HTTP, served by the event loop: there, and only there, is a service's state at rest.

    An answer takes a few milliseconds.
    """

    def __init__(self, collector: Collector) -> None:
        """Serves what the collector yields, and the process's memory, CPU time and descriptors; nothing global."""
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(collector)
        self._server: asyncio.Server | None = None
        self.address = ""  # as bound

    async def start(self, address: str) -> None:
        """Listens; raises AddressError when the address is taken or not of this host."""
        host, port = address.rsplit(":", 1)
        try:
            self._server = await asyncio.start_server(
                self._serve, host.strip("[]"), int(port), limit=_MAX_HEAD_BYTES, reuse_address=True
            )
        except OSError as error:
            # asyncio's own text repeats the address.
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            raise AddressError(
                f"{FLAG}: cannot listen on {address}: {why}; choose a free port of an address of this host"
            ) from error
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """Stops listening; may be called at any time."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_HEAD_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head.split(b"\r\n", 1)[0].decode("latin-1")))
                await writer.drain()
        writer.close()

    def _answer(self, request_line: str) -> bytes:
        method, target, *_ = (*request_line.split(" "), "", "")
        if method != "GET":
            return _response("405 Method Not Allowed", "text/plain", b"only GET\n")
        if target.split("?", 1)[0] != PATH:
            return _response("404 Not Found", "text/plain", f"only {PATH}\n".encode())
        return _response("200 OK", _CONTENT_TYPE, generate_latest(self._registry))


def _response(status: str, content_type: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
